"""What may stand in a pickle beside plain containers, and what it is read as. A name that is not here is refused."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from polyak.errors import FileFormatError
from polyak.files.dtypes import BY_NUMPY, BY_STORAGE, DTYPES

from .pickled import Name
from .stored import Leaf, Record, Span, Stored, stored

# Kept as records: data that trainers put beside the weights. None of these classes is imported or called. A name that
# ends in a dot stands for all that begins with it.
_RECORDS = (
    "argparse.Namespace",
    "builtins.bytearray",
    "builtins.complex",
    "builtins.range",
    "builtins.slice",
    "builtins.xrange",
    "collections.deque",
    "datetime.",
    "decimal.Decimal",
    "fractions.Fraction",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "mmengine.config.config.ConfigDict",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.numeric._frombuffer",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.numeric._frombuffer",
    "numpy.dtype",
    "numpy.ndarray",
    "omegaconf.base.",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.",
    "pathlib.",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "re._compile",
    "torch.device",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.distributed.checkpoint.filesystem._StoragePrefix",
    "torch.distributed.checkpoint.metadata.",
    "torch.distributed.device_mesh.DeviceMesh",
    "torch.distributed.tensor.",
    "torch.serialization._get_layout",
    "torch.torch_version.TorchVersion",
    "types.SimpleNamespace",
    "uuid.UUID",
)
_QSCHEMES = ("per_tensor_affine", "per_channel_affine", "per_channel_affine_float_qparams")
_QUANTISED = ("qint8", "quint8", "qint32", *_QSCHEMES)
_OTHER_DTYPES = ("bits", "complex32", "float4_", "int1", "int2", "int3", "int4", "int5", "int6", "int7", "uint")
NO_PLAIN_TENSOR = "torch._utils._rebuild_"
# Tensors of kinds that are not averaged, and are left where they are.
_OTHER_TENSORS = (
    "torch._utils._rebuild_device_tensor_from_numpy",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor",
    "torch._utils._rebuild_meta_tensor_no_storage",
    "torch._utils._rebuild_nested_tensor",
    "torch._utils._rebuild_qtensor",
    "torch._utils._rebuild_sparse_tensor",
    "torch._utils._rebuild_wrapper_subclass",
)


@dataclass(frozen=True, slots=True)
class StorageOf:
    """What a persistent name stands for: a storage in the file and the dtype of its numbers."""

    dtype: str
    span: Span


def find(name: str, *, skip_objects: bool) -> Name:
    """What a class or function in a pickle is read as.

    Args:
        name: "module.name".
        skip_objects: whether an unknown class is kept as a record, without being imported, instead of refused.

    Raises:
        FileFormatError: it is unknown.
    """
    name = name.replace("__builtin__.", "builtins.", 1)
    if name in _READ:
        return Name(name, _or_record(name, _READ[name]) if skip_objects and name not in _TENSORS else _READ[name])
    module, _, last = name.rpartition(".")
    if module in ("torch", "torch.cuda", "torch.storage") and last in BY_STORAGE:
        return Name(BY_STORAGE[last].name, _refuse_call(name))
    if module == "torch" and (last in DTYPES or last.startswith(_OTHER_DTYPES)):
        return Name(last, _refuse_call(name))
    if skip_objects or any(name == known or (known[-1] == "." and name.startswith(known)) for known in _RECORDS):
        return Name(name, _record(name))
    raise FileFormatError(
        f"holds the object {name}, whose loading could run code, and is not read",
        needs=("skip_objects", "run_pickled_code"),
    )


def storage(kind: object, span: Span) -> StorageOf:
    """A storage whose class the pickle gives; an untyped one counts bytes."""
    if not isinstance(kind, Name) or kind.name not in DTYPES:
        raise FileFormatError("a storage in it is of no known kind")
    return StorageOf(kind.name, span)


def _or_record(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """What is read where it can be, and kept as a record where its arguments are of another kind."""

    def read(*arguments: Any) -> Any:
        try:
            return call(*arguments)
        except (FileFormatError, TypeError, ValueError):
            return Record(name, arguments)

    return read


def _record(name: str) -> Callable[..., Record]:
    return lambda *arguments: Record(name, arguments)


def _refuse_call(name: str) -> Callable[..., Any]:
    def refuse(*_: object) -> Any:
        raise FileFormatError(f"a pickle in it calls {name}, which no file of tensors needs")

    return refuse


def _tensor(*arguments: Any) -> Stored | Record:
    kept, start, shape, stride, *more = arguments
    if not isinstance(kept, StorageOf):
        raise FileFormatError("a tensor in it has no storage")
    # Behind requires_grad and hooks: whether the numbers are the conjugates or negatives of those in the file.
    if len(more) > 2 and more[2]:
        return Record(f"{NO_PLAIN_TENSOR}v2", arguments)
    return stored(kept.dtype, shape, stride, start, kept.span)


def _tensor_of_dtype(*arguments: Any) -> Stored | Record:
    """As newer dtypes are kept: the storage has bytes, and the dtype stands beside it."""
    kept, start, shape, stride, _, _, dtype, *_ = arguments
    if not isinstance(kept, StorageOf) or not isinstance(dtype, Name):
        raise FileFormatError("a tensor in it has no storage")
    if dtype.name not in DTYPES:
        return Record(f"{NO_PLAIN_TENSOR}v3", arguments)
    return stored(dtype.name, shape, stride, start, kept.span)


def _tensor_with_attributes(*arguments: Any) -> Any:
    """A tensor of a subclass, or one with attributes: the tensor that it is, where it is a plain one."""
    function, kind, inner, *_ = arguments
    if isinstance(function, Name) and isinstance(inner, tuple) and function.name in _TENSORS:
        return function.call(*cast("tuple[Any, ...]", inner))
    return Record(kind.name if isinstance(kind, Name) else "torch.Tensor", arguments)


def _parameter(*arguments: Any) -> Leaf | Record:
    tensor = arguments[0]
    if not isinstance(tensor, (Stored, Record)):
        raise FileFormatError("a parameter in it is no tensor")
    return tensor


def _dictionary(*arguments: Any) -> dict[Any, Any]:
    """An empty dictionary, or one of pairs, as Python 2 kept it."""
    pairs = cast("list[Any]", arguments[-1] if arguments and isinstance(arguments[-1], list) else [])
    found: dict[Any, Any] = {}
    for pair in pairs:
        key, value = pair
        if not isinstance(key, (str, int)):
            raise FileFormatError("a pickle in it has a dictionary whose keys are neither names nor numbers")
        found[key] = value
    return found


def _sequence(*arguments: Any) -> tuple[Any, ...]:
    given = arguments[0] if arguments else ()
    if not isinstance(given, (tuple, list)):
        raise FileFormatError("a pickle in it makes a sequence of what is none")
    return tuple(cast("tuple[Any, ...]", given))


def _list(*arguments: Any) -> list[Any]:
    return list(_sequence(*arguments))


def _no_bytes(*arguments: Any) -> bytes:
    """Empty bytes, as protocol 2 keeps them; a number would ask for memory."""
    if arguments:
        raise FileFormatError("a pickle in it calls builtins.bytes, which no file of tensors needs")
    return b""


def _attribute(*arguments: Any) -> Record:
    """A method of a class by its name, as mmengine keeps the statistics of its logs; only its name is kept."""
    kind, name = arguments
    if not isinstance(kind, Name) or not kind.name.startswith("mmengine.logging."):
        raise FileFormatError("a pickle in it asks for an attribute, which no file of tensors needs")
    return Record(f"{kind.name}.{name}")


def _encode(*arguments: Any) -> bytes:
    text, encoding = arguments
    if not isinstance(text, str) or encoding != "latin1":
        raise FileFormatError("a pickle in it encodes what is no text")
    return text.encode("latin1")


def _number(*arguments: Any) -> Any:
    """A number of numpy's: its dtype and bytes."""
    dtype, data = arguments
    kind = dtype.arguments[0] if isinstance(dtype, Record) and dtype.of == "numpy.dtype" and dtype.arguments else None
    known = BY_NUMPY.get(kind.lstrip("<|=")) if isinstance(kind, str) else None
    if known is not None and known.struct is not None and isinstance(data, (bytes, bytearray)):
        return struct.unpack(f"<{known.struct}", data)[0]
    return Record("numpy scalar", arguments)


_TENSORS: Mapping[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    **{name: _record(name) for name in _OTHER_TENSORS},
}
_READ: Mapping[str, Callable[..., Any]] = {
    **_TENSORS,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _tensor_with_attributes,
    "torch.Size": _sequence,
    "torch.Tensor": _refuse_call("torch.Tensor"),
    **{f"torch.{name}": _refuse_call(f"torch.{name}") for name in _QUANTISED},
    "torch.nn.parameter.Parameter": _refuse_call("torch.nn.Parameter"),
    "collections.OrderedDict": _dictionary,
    "collections.defaultdict": _dictionary,
    "collections.Counter": lambda *_: {},
    "dnnlib.util.EasyDict": _dictionary,
    "_codecs.encode": _encode,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
    "builtins.getattr": _attribute,
    "builtins.bytes": _no_bytes,
    "builtins.set": _sequence,
    "builtins.frozenset": _sequence,
    "builtins.list": _list,
    "builtins.tuple": _sequence,
    "builtins.dict": _dictionary,
    # Factories of a defaultdict: named, never called.
    **{f"builtins.{name}": _refuse_call(f"builtins.{name}") for name in ("int", "float", "str", "bool")},
}
