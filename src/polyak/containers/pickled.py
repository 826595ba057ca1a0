"""Reads pickles as data: a small machine that knows how to build containers, and calls nothing that a pickle names.

Python's own unpickler imports whatever a pickle asks for and calls it. Here a name stands for itself, and what may be
done with it is looked up by the caller of this file, in a table; a name that is not in it ends the reading.
`torch.load(weights_only=True)` works the same way, but makes real tensors, and refuses a whole file for one harmless
object in it; its earlier versions could be led to run code, and these are still installed.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO, cast

from polyak.errors import FileFormatError

from .stored import Record

_MAX_KEY_PARTS = 8
_Call = Callable[..., Any]


class Name:
    """A class or function by its name, with what is done when a pickle calls it."""

    __slots__ = ("call", "name")

    def __init__(self, name: str, call: _Call) -> None:
        self.name = name
        self.call = call


class _Mark:
    __slots__ = ()


_MARK = _Mark()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": list}
_NUMBERS = "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT"
_TEXTS = "STRING BINSTRING SHORT_BINSTRING UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8"
_PUSHED = frozenset(f"{_NUMBERS} {_TEXTS} BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split())
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_GETS = frozenset({"GET", "BINGET", "LONG_BINGET"})


def unpickle(stream: BinaryIO, *, find: Callable[[str], Name], persistent: Callable[[Any], Any]) -> Any:
    """Reads one pickle from where the stream stands; sets become lists, and objects what `find` makes of their class.

    Args:
        stream: of the pickle's bytes; is left behind it.
        find: what stands for a class or function, given as "module.name"; raises where it may not be used.
        persistent: what stands for something outside of the pickle, such as the storage of a tensor.

    Raises:
        FileFormatError: the pickle is damaged, or holds what is not read.
        Exception: what `find` and `persistent` raise; and, of a damaged pickle, whatever its bytes lead to.
    """
    machine = _Machine(find, persistent)
    for operation, argument, _ in pickletools.genops(stream):
        machine.step(operation.name, argument)
    return machine.result()


class _Machine:
    """The stack and the memory that the operations of a pickle work on."""

    def __init__(self, find: Callable[[str], Name], persistent: Callable[[Any], Any]) -> None:
        self.find = find
        self.persistent = persistent
        self.stack: list[Any] = []
        self.memory: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _PUSHED:
            stack.append(argument)
        elif name in _PUTS:
            self.memory[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            self.memory[len(self.memory)] = stack[-1]
        elif name in _GETS:
            stack.append(self.memory[int(argument)])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack[-count:] = [tuple(self.last(count))]
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in ("PROTO", "FRAME", "STOP"):
            pass
        else:
            operation = getattr(self, f"_{name.lower()}", None)
            if operation is None:
                raise FileFormatError(f"a pickle in it has the operation {name}, which no file of tensors needs")
            operation(argument)

    def last(self, count: int) -> list[Any]:
        """The last values on the stack, which stay there."""
        values = self.stack[-count:]
        if len(values) < count or any(value is _MARK for value in values):
            raise FileFormatError("a pickle in it is damaged: a value is missing")
        return values

    def pop(self) -> Any:
        value = self.last(1)[0]
        del self.stack[-1]
        return value

    def pop_to_mark(self) -> list[Any]:
        place = len(self.stack) - 1
        while self.stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise FileFormatError("a pickle in it is damaged: a value is missing")
        values = self.stack[place + 1 :]
        del self.stack[place:]
        return values

    def result(self) -> Any:
        if len(self.stack) != 1:
            raise FileFormatError("a pickle in it is damaged: it ends in the middle")
        return self.pop()

    def _pop(self, _: None) -> None:
        del self.stack[-1]

    def _pop_mark(self, _: None) -> None:
        self.pop_to_mark()

    def _dup(self, _: None) -> None:
        self.stack.append(self.last(1)[0])

    def _tuple(self, _: None) -> None:
        self.stack.append(tuple(self.pop_to_mark()))

    def _list(self, _: None) -> None:
        self.stack.append(self.pop_to_mark())

    def _frozenset(self, _: None) -> None:
        self.stack.append(self.pop_to_mark())

    def _dict(self, _: None) -> None:
        values = self.pop_to_mark()
        self.stack.append({})
        self.set_items(values)

    def _setitem(self, _: None) -> None:
        values = self.last(2)
        del self.stack[-2:]
        self.set_items(values)

    def _setitems(self, _: None) -> None:
        self.set_items(self.pop_to_mark())

    def set_items(self, values: list[Any]) -> None:
        target = self.last(1)[0]
        # What was a subclass of dict may come as a record; its items are of no use here.
        if isinstance(target, Record):
            return
        if not isinstance(target, dict) or len(values) % 2:
            raise FileFormatError("a pickle in it is damaged: items are set in what is no dictionary")
        dictionary = cast("dict[Any, Any]", target)
        for key, value in zip(values[::2], values[1::2], strict=True):
            dictionary[_key(key)] = value

    def _append(self, _: None) -> None:
        self.extend([self.pop()])

    def _appends(self, _: None) -> None:
        self.extend(self.pop_to_mark())

    _additems = _appends

    def extend(self, values: list[Any]) -> None:
        target = self.last(1)[0]
        if isinstance(target, Record):
            return
        if not isinstance(target, list):
            raise FileFormatError("a pickle in it is damaged: values are appended to what is no list")
        cast("list[Any]", target).extend(values)

    def _global(self, argument: str) -> None:
        self.stack.append(self.find(argument.replace(" ", ".", 1)))

    def _stack_global(self, _: None) -> None:
        module, name = self.last(2)
        del self.stack[-2:]
        if not (isinstance(module, str) and isinstance(name, str)):
            raise FileFormatError("a pickle in it is damaged: a name is no text")
        self.stack.append(self.find(f"{module}.{name}"))

    def _binpersid(self, _: None) -> None:
        self.stack.append(self.persistent(self.pop()))

    def _reduce(self, _: None) -> None:
        function, arguments = self.last(2)
        del self.stack[-2:]
        self.call(function, arguments)

    _newobj = _reduce

    def _newobj_ex(self, _: None) -> None:
        function, arguments, _keywords = self.last(3)
        del self.stack[-3:]
        self.call(function, arguments)

    def call(self, function: object, arguments: object) -> None:
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise FileFormatError("a pickle in it is damaged: it calls what is no function")
        self.stack.append(function.call(*cast("tuple[Any, ...]", arguments)))

    def _build(self, _: None) -> None:
        state = self.pop()
        target = self.last(1)[0]
        if isinstance(target, Record):
            target.state = state
        # The state of anything else is what its class keeps beside its data, such as the metadata of a state_dict.
        elif isinstance(target, Name):
            raise FileFormatError(f"a pickle in it changes {target.name}, which no file of tensors needs")


def _key(key: object) -> Any:
    """A key of a dictionary: plain values, or a few of them in a tuple; hashing deeper tuples can take for ever.

    A record is equal to itself alone.
    """
    parts = cast("tuple[object, ...]", key) if isinstance(key, tuple) else (key,)
    if len(parts) > _MAX_KEY_PARTS or not all(
        part is None or isinstance(part, (str, int, float, bytes, Record)) for part in parts
    ):
        raise FileFormatError("a pickle in it has a dictionary whose keys are neither names nor numbers")
    return cast("Any", key)
