"""Every place of a model that holds a tensor, whatever wraps the model. Only this file knows wrappers."""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from polyak.names import WRAPPER_SEGMENTS, join

_DATA_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
# They do more than to pass calls on, and are still only wrappers: apex, fairscale, DeepSpeed.
_KNOWN_WRAPPERS = frozenset(
    {"DistributedDataParallel", "ShardedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"}
)
# Where wrappers keep the model under another name: Lightning Fabric.
_INSIDE_OF = {"_FabricModule": "_forward_module"}


# Sites and entries are named tuples because a model has thousands, and a frozen dataclass takes five times as long to
# create. They are compared by identity, because tensors cannot be compared by value.
class Site(NamedTuple):
    """One place in a model that holds a tensor: `holder[key]`, a module's own dictionary."""

    __eq__ = object.__eq__
    __ne__ = object.__ne__
    __hash__ = object.__hash__

    name: str
    module: nn.Module
    holder: dict[str, Any]
    key: str
    is_parameter: bool
    persistent: bool

    @property
    def tensor(self) -> Tensor:
        """The tensor that this place holds now."""
        return self.holder[self.key]


def unwrap(model: nn.Module) -> nn.Module:
    """The bare model inside of `torch.compile`, DataParallel, DDP, Fabric and whatever wraps a whole model as they do.

    Example:
        >>> bare = nn.Linear(2, 2)
        >>> unwrap(nn.DataParallel(bare)) is bare
        True
    """
    while True:
        known = "module" if _wraps(model) else _INSIDE_OF.get(type(model).__name__, "")
        inner = model._modules.get(next((name for name in model._modules if name in WRAPPER_SEGMENTS), known))
        if inner is None:
            return model
        model = inner


def _wraps(model: nn.Module) -> bool:
    """Whether a module does nothing but hold a model under the name `module` and pass its calls on."""
    if isinstance(model, _DATA_PARALLEL) or type(model).__name__ in _KNOWN_WRAPPERS:
        return isinstance(model._modules.get("module"), nn.Module)
    own = [tensor for tensor in (*model._parameters.values(), *model._buffers.values()) if tensor is not None]
    return not own and list(model._modules) == ["module"] and _passes_on(type(model).forward)


def _passes_on(forward: Callable[..., Any]) -> bool:
    """Whether a function is of the form `return self.module(...)`, or not written: it computes nothing of its own."""
    if forward is nn.Module.forward:
        return True
    code = getattr(forward, "__code__", None)
    if code is None or code.co_names != ("module",):
        return False
    return not any(step.opname.startswith(("BINARY", "UNARY", "COMPARE")) for step in dis.get_instructions(code))


def walk(model: nn.Module) -> Iterator[Site]:
    """Every place of the bare model that holds a tensor, in the order of `state_dict()`."""
    yield from _walk(unwrap(model), ())


def extra_states(model: nn.Module) -> dict[str, Any]:
    """What modules add to the bare model's `state_dict` by `get_extra_state`, by its name there."""
    found: dict[str, Any] = {}
    for name, module in cast("Iterator[tuple[str, nn.Module]]", unwrap(model).named_modules(remove_duplicate=False)):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            found[join([*name.split("."), "_extra_state"]).removeprefix(".")] = module.get_extra_state()
    return found


def _walk(module: nn.Module, path: tuple[str, ...]) -> Iterator[Site]:
    for holder, is_parameter in ((module._parameters, True), (module._buffers, False)):
        for key, tensor in holder.items():
            if tensor is not None:
                persistent = is_parameter or key not in module._non_persistent_buffers_set
                yield Site(join((*path, key)), module, holder, key, is_parameter, persistent)
    for name, child in module._modules.items():
        if child is not None:
            transparent = name in WRAPPER_SEGMENTS or (name == "module" and isinstance(module, _DATA_PARALLEL))
            yield from _walk(child, path if transparent else (*path, name))
