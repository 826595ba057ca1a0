"""How files hold tensors: opened as trees of tensors that are not read yet. Without torch, and running nothing."""

from .folder import CONFIGURATION as CONFIGURATION
from .folder import read_json as read_json
from .opening import STATES as STATES
from .opening import damaged as damaged
from .opening import open_content as open_content
from .safetensors_file import SAFETENSORS_DTYPES as SAFETENSORS_DTYPES
from .stored import ITEM_SIZES as ITEM_SIZES
from .stored import Between as Between
from .stored import Content as Content
from .stored import Leaf as Leaf
from .stored import Pieced as Pieced
from .stored import Record as Record
from .stored import Span as Span
from .stored import Stored as Stored
from .stored import leaves_of as leaves_of
from .stored import parts_of as parts_of
from .verification import CHECKSUM_DIGITS as CHECKSUM_DIGITS
from .verification import CHECKSUMS as CHECKSUMS
from .verification import Verification as Verification
from .verification import verify as verify
