"""How files hold tensors: opened as trees of tensors that are not read yet. Without torch, and running nothing."""

from .content import CONFIGURATION as CONFIGURATION
from .content import STATES as STATES
from .content import damaged as damaged
from .content import open_content as open_content
from .content import read_json as read_json
from .reader import Reader as Reader
from .reader import wide as wide
from .regions import Region as Region
from .regions import all_regions as all_regions
from .regions import flattened as flattened
from .regions import item_bytes as item_bytes
from .regions import sizes as sizes
from .regions import spread_regions as spread_regions
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
