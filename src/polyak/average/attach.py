"""Updates by themselves: after each step that optimizers really made."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import Any, cast

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class Attachment:
    """Calls a function after each round of optimizer steps, until it is detached.

    A round is over when each of the optimizers has made a step. A step that a `GradScaler` skipped is none: most
    optimizers are not even called then, and a fused one, which is, says so in its `found_inf`.

    Args:
        optimizers: whose steps count.
        call: what to do after each round.
        on_detach: what to do at the end.
    """

    def __init__(
        self, optimizers: tuple[Optimizer, ...], call: Callable[[], None], on_detach: Callable[[], None]
    ) -> None:
        self._call = call
        self._on_detach = on_detach
        hooked = dict.fromkeys(map(_hooked, optimizers))
        self._num_optimizers = len(hooked)
        self._stepped: set[int] = set()
        self._hooks: list[RemovableHandle] = [
            optimizer.register_step_post_hook(self._after_step) for optimizer in hooked
        ]

    def detach(self) -> None:
        """Ends it; the average is updated by `update()` again. Does nothing where it has ended already."""
        if self._hooks:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
            self._on_detach()

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        found_inf: object = getattr(optimizer, "found_inf", None)
        # A host synchronisation, where a fused optimizer on a GPU runs under a GradScaler; nowhere else.
        if isinstance(found_inf, Tensor) and bool(found_inf.any()):
            return
        self._stepped.add(id(optimizer))
        if len(self._stepped) == self._num_optimizers:
            self._stepped.clear()
            self._call()


def _hooked(optimizer: Optimizer) -> Optimizer:
    """The optimizer that makes the steps, where a wrapper without hooks of its own (accelerate's) passes them on."""
    while not hasattr(optimizer, "_optimizer_step_post_hooks"):
        optimizer = cast("Any", optimizer).optimizer
    return optimizer


def check_optimizers(optimizers: Sequence[Optimizer], own: Set[int], at: object) -> None:
    """Raises TypeError or ValueError unless these can be attached to a model.

    Args:
        optimizers: one or more.
        own: the identities of the model's tensors.
        at: a function that gives the time, or None.
    """
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):  # pyright: ignore[reportUnnecessaryIsInstance]  # users pass anything
            raise TypeError(f"attach: a torch.optim.Optimizer is needed, not {type(optimizer).__name__}")
    if not optimizers:
        raise TypeError("attach: at least one optimizer is needed")
    if at is not None and not callable(at):
        raise TypeError(
            f"attach: at={at!r} is no function; it gives the time after a step, as in at=lambda: num_images"
        )
    for optimizer in optimizers:
        if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            raise ValueError(
                f"attach: this {type(optimizer).__name__} trains no parameter of the model; make the optimizer and "
                "the average of the same model"
            )
