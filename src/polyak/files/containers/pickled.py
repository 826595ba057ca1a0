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

_MAX_KEY_PARTS = 64
_MAX_COPIED = 1 << 22
_BYTES_OF_ONE = 64
# A tensor takes 30 of them, and each of them 72 bytes of memory at most.
_MAX_OPERATIONS = 10_000_000
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
_NUMBERS = "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT"
_TEXTS = "STRING BINSTRING SHORT_BINSTRING UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8"
_BYTES = "BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8"
_IGNORED = "PROTO FRAME STOP"


def unpickle(
    stream: BinaryIO,
    *,
    find: Callable[[str], Name],
    persistent: Callable[[Any], Any],
    max_operations: int = _MAX_OPERATIONS,
) -> Any:
    """Reads one pickle from where the stream stands; sets become lists, and objects what `find` makes of their class.

    Args:
        stream: of the pickle's bytes; is left behind it.
        find: what stands for a class or function, given as "module.name"; raises where it may not be used.
        persistent: what stands for something outside of the pickle, such as the storage of a tensor.
        max_operations: that the pickle may have; each can take many times the memory that it takes in the file.

    Raises:
        FileFormatError: the pickle is damaged, holds what is not read, or too much.
        Exception: what `find` and `persistent` raise; and, of a damaged pickle, whatever its bytes lead to.
    """
    machine = _Machine(find, persistent)
    operations = machine.operations()
    for count, (operation, argument, _) in enumerate(pickletools.genops(stream)):
        if count == max_operations:
            raise FileFormatError(f"a pickle in it has over {count:,} operations, which no file of tensors needs")
        run = operations.get(operation.name)
        if run is None:
            raise FileFormatError(f"a pickle in it has the operation {operation.name}, which no file of tensors needs")
        run(argument)
    return machine.result()


class _Machine:
    """The stack and the memory that the operations of a pickle work on."""

    def __init__(self, find: Callable[[str], Name], persistent: Callable[[Any], Any]) -> None:
        self.find = find
        self.persistent = persistent
        self.stack: list[Any] = []
        self.memory: dict[int, Any] = {}
        self.num_copied = 0

    def operations(self) -> dict[str, Callable[[Any], object]]:
        """What is done for each operation of a pickle; there is no other."""
        push = self.stack.append
        return {
            **dict.fromkeys(f"{_NUMBERS} {_TEXTS} {_BYTES}".split(), push),
            **dict.fromkeys(_IGNORED.split(), lambda _: None),
            **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), self.put),
            **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda place: push(self.memory[int(place)])),
            "MEMOIZE": lambda _: self.put(len(self.memory)),
            "MARK": lambda _: push(_MARK),
            "NONE": push,
            "NEWTRUE": lambda _: push(True),
            "NEWFALSE": lambda _: push(False),
            "EMPTY_DICT": lambda _: push({}),
            "EMPTY_LIST": lambda _: push([]),
            "EMPTY_SET": lambda _: push([]),
            "EMPTY_TUPLE": lambda _: push(()),
            "TUPLE1": lambda _: push(tuple(self.take(1))),
            "TUPLE2": lambda _: push(tuple(self.take(2))),
            "TUPLE3": lambda _: push(tuple(self.take(3))),
            "TUPLE": lambda _: push(tuple(self.take_to_mark())),
            "LIST": lambda _: push(self.take_to_mark()),
            "FROZENSET": lambda _: push(self.take_to_mark()),
            "DICT": lambda _: self.make_dictionary(self.take_to_mark()),
            "SETITEM": lambda _: self.set_items(self.take(2)),
            "SETITEMS": lambda _: self.set_items(self.take_to_mark()),
            "APPEND": lambda _: self.extend(self.take(1)),
            "APPENDS": lambda _: self.extend(self.take_to_mark()),
            "ADDITEMS": lambda _: self.extend(self.take_to_mark()),
            "POP": lambda _: self.stack.pop(),
            "POP_MARK": lambda _: self.take_to_mark(),
            "DUP": lambda _: push(self.last(1)[0]),
            "GLOBAL": lambda name: push(self.find(name.replace(" ", ".", 1))),
            "STACK_GLOBAL": lambda _: self.name(*self.take(2)),
            "BINPERSID": lambda _: push(self.persistent(self.take(1)[0])),
            "REDUCE": lambda _: self.call(*self.take(2)),
            "NEWOBJ": lambda _: self.call(*self.take(2)),
            "NEWOBJ_EX": lambda _: self.call(*self.take(3)[:2]),
            "BUILD": lambda _: self.build(self.take(1)[0]),
        }

    def last(self, count: int) -> list[Any]:
        """The last values on the stack, which stay there."""
        values = self.stack[-count:]
        if len(values) < count or any(value is _MARK for value in values):
            raise FileFormatError("a pickle in it is damaged: a value is missing")
        return values

    def take(self, count: int) -> list[Any]:
        """The last values on the stack, taken from it."""
        values = self.last(count)
        del self.stack[-count:]
        return values

    def take_to_mark(self) -> list[Any]:
        place = len(self.stack) - 1
        while self.stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise FileFormatError("a pickle in it is damaged: a value is missing")
        values = self.stack[place + 1 :]
        del self.stack[place:]
        return values

    def put(self, place: Any) -> None:
        self.memory[int(place)] = self.stack[-1]

    def result(self) -> Any:
        if len(self.stack) != 1:
            raise FileFormatError("a pickle in it is damaged: it ends in the middle")
        return self.take(1)[0]

    def make_dictionary(self, values: list[Any]) -> None:
        self.stack.append({})
        self.set_items(values)

    def set_items(self, values: list[Any]) -> None:
        target = self.last(1)[0]
        # What was a subclass of dict may come as a record.
        given = target.items if isinstance(target, Record) else target
        if not isinstance(given, dict) or len(values) % 2:
            raise FileFormatError("a pickle in it is damaged: items are set in what is no dictionary")
        dictionary = cast("dict[Any, Any]", given)
        dictionary.update((key, value) for key, value in zip(values[::2], values[1::2], strict=True) if _is_key(key))

    def extend(self, values: list[Any]) -> None:
        target = self.last(1)[0]
        if isinstance(target, Record):
            target.items.update(enumerate(values, len(target.items)))
            return
        if not isinstance(target, list):
            raise FileFormatError("a pickle in it is damaged: values are appended to what is no list")
        cast("list[Any]", target).extend(values)

    def name(self, module: object, name: object) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise FileFormatError("a pickle in it is damaged: a name is no text")
        self.stack.append(self.find(f"{module}.{name}"))

    def call(self, function: object, arguments: object) -> None:
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise FileFormatError("a pickle in it is damaged: it calls something that is not a function")
        given = cast("tuple[Any, ...]", arguments)
        # What is kept once in the pickle, and copied at each of many calls, is as large as its author likes.
        self.num_copied += sum(len(cast("list[Any]", part)) for part in given if isinstance(part, list))
        self.num_copied += sum(len(part) // _BYTES_OF_ONE for part in given if isinstance(part, str))
        if self.num_copied > _MAX_COPIED:
            raise FileFormatError("a pickle in it copies the same again and again, which no file of tensors needs")
        made = function.call(*given)
        self.stack.append(made)

    def build(self, state: object) -> None:
        target = self.last(1)[0]
        if isinstance(target, Record):
            target.state = state
        # The state of anything else is what its class keeps beside its data, such as the metadata of a state_dict.
        elif isinstance(target, Name):
            raise FileFormatError(f"a pickle in it changes {target.name}, which no file of tensors needs")


def _is_key(key: object) -> bool:
    """Whether something can be looked up: plain values, or a few in tuples. To hash deep tuples can take for ever."""
    left, count = [key], 0
    while left and count < _MAX_KEY_PARTS:
        part, count = left.pop(), count + 1
        if isinstance(part, tuple):
            left += cast("tuple[object, ...]", part)
        elif not (part is None or isinstance(part, (str, int, float, bytes, Record, Name))):
            return False
    return not left
