"""Whether a model still consists of the same modules and tensors, asked at every update."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from operator import attrgetter, is_, is_not
from typing import Any

from torch import Tensor, nn

from polyak.kernels import Look, is_plain, tried_way, why_not_in_c
from polyak.ranks import is_sharded, local

_IS_SOMETHING = partial(is_not, None)
_LOCAL, _SPEC = attrgetter("_local_tensor"), attrgetter("_spec")
_DICTIONARIES = attrgetter("_parameters", "_buffers", "_modules")


class Watch:
    """Tells whether a model still consists of the same modules and tensors. It reads no tensor's values.

    It holds the model's parts, but not the model itself. The check in C compares all names, objects, addresses, dtypes,
    shapes and strides. If C cannot be used, or with POLYAK_WATCH=python in the environment, Python compares the
    addresses of tensors and the identity of everything else, which takes several times as long. It does not detect
    another shape or other strides at the same address, as after `parameter.data = parameter.data.t()`, or other names:
    those are left to the thorough check. Both accept another tensor object in the same memory until that check.

    Attributes:
        note: why the look is made in Python; empty if it is made in C.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._inner = modules[1:]
        self._dictionaries = _dictionaries([model, *self._inner])
        self._sharded: list[Tensor] = []
        self._specs: list[object] = []
        self.note = why_not_in_c()
        self._parts: Look | _Comparison = _Comparison(modules) if self.note else self._look(modules)

    def _look(self, modules: Sequence[nn.Module]) -> Look | _Comparison:
        way, holders = tried_way(), list(chain.from_iterable(self._dictionaries))
        assert way is not None
        tensors = {id(value): value for value in _values(holders) if isinstance(value, Tensor)}
        locals_ = {number: local(tensor) for number, tensor in tensors.items()}
        self._sharded = [tensor for number, tensor in tensors.items() if tensor is not locals_[number]]
        self._specs = list(map(_SPEC, self._sharded))
        try:
            return Look(holders, {number: tensor for number, tensor in locals_.items() if is_plain(tensor)}, way)
        except ValueError as error:
            self.note = str(error)
            return _Comparison(modules)

    def is_current(self) -> bool:
        """Whether nothing was added, removed or replaced."""
        return self._parts.is_same()

    def is_unchanged(self, model: nn.Module) -> bool:
        """Whether a walk through the model would certainly find what it found when this was made.

        Beyond `is_current`, the modules' own dictionaries and the specifications of DTensors must be the same objects,
        and no tensor may have given way to another one in the same memory. False for the check in Python.

        Args:
            model: the one that this was made for.
        """
        if not isinstance(self._parts, Look) or not self._parts.is_same() or self._parts.has_followed:
            return False
        found = chain.from_iterable(_dictionaries([model, *self._inner]))
        return all(map(is_, found, chain.from_iterable(self._dictionaries))) and all(
            map(is_, map(_SPEC, self._sharded), self._specs)
        )


def _dictionaries(modules: Sequence[nn.Module]) -> list[tuple[dict[str, Any], ...]]:
    return list(map(_DICTIONARIES, modules))


class _Comparison:
    """The check in Python: addresses of tensors, and the identity of everything else."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._children = [module._modules for module in modules if module._modules]
        self._modules: list[object] = list(_values(self._children))
        # Kept in separate lists: a pass without None checks is twice as fast, and empty dictionaries cost next to
        # nothing.
        self._empty: list[dict[str, Any]] = [module._modules for module in modules if not module._modules]
        self._full: list[dict[str, Any]] = []
        self._gaps: list[dict[str, Any]] = []
        self._sharded: list[dict[str, Any]] = []
        self._others: list[dict[str, Any]] = []
        for holder in (holder for module in modules for holder in (module._parameters, module._buffers)):
            self._list_for(holder).append(holder)
        self._other_values: list[object] = list(_values(self._others))
        self._other_tensors = [t for t in self._other_values if isinstance(t, Tensor) and is_plain(t)]
        self._shards = [t for t in self._other_values if isinstance(t, Tensor) and is_sharded(t)]
        # Strong references: an address may be given to another tensor after its own is gone.
        locals_ = map(_LOCAL, chain(_values(self._sharded), self._shards))
        self._held = [*_values(chain(self._full, self._gaps, self._sharded, self._others)), *locals_]
        self._addresses = self._find_addresses()

    def _list_for(self, holder: dict[str, Any]) -> list[dict[str, Any]]:
        found = [value for value in holder.values() if value is not None]
        if holder and all(map(is_sharded, holder.values())):
            return self._sharded
        if not all(map(is_plain, found)):
            return self._others
        if len(found) < len(holder):
            return self._gaps
        return self._full if holder else self._empty

    def _find_addresses(self) -> list[int]:
        tensors = chain(_values(self._full), filter(_IS_SOMETHING, _values(self._gaps)), self._other_tensors)
        shards = map(_LOCAL, chain(_values(self._sharded), self._shards))
        return list(map(Tensor.data_ptr, chain(tensors, shards)))

    def is_same(self) -> bool:
        """Whether nothing was added, removed or replaced."""
        try:
            return (
                not any(self._empty)
                and _same(self._children, self._modules)
                and self._find_addresses() == self._addresses
                and _same(self._others, self._other_values)
            )
        except (AttributeError, RuntimeError, TypeError):
            return False  # something without an address took a tensor's place


def _values(holders: Iterable[dict[str, Any]]) -> Iterable[Any]:
    return chain.from_iterable(map(dict[str, Any].values, holders))


def _same(holders: Iterable[dict[str, Any]], held: list[object]) -> bool:
    values = list(_values(holders))
    return len(values) == len(held) and all(map(is_, values, held))
