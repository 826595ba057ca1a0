"""`Average`: what can be done with one average. A `WeightAverage` with one profile is one itself."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from polyak.errors import StateError, listed
from polyak.kernels import check_floating_point
from polyak.model import Watch, build_module, extra_states, match_sites
from polyak.profiles import Profile
from polyak.ranks import local

from .agreement import agreed
from .core import Core
from .export import by_every_name, check_can_be_whole, export
from .swapped import check_not_standing, raise_if_changed, swap_in, swap_out, swapped


class Average:
    """One average by its name, as `average[name]` gives it. It holds nothing of its own.

    Example:
        >>> import polyak
        >>> model = nn.Linear(2, 2)
        >>> average = polyak.WeightAverage(model, {"short": polyak.Power(relative_std=0.05), "mean": polyak.Uniform()})
        >>> average.update()
        >>> with average["short"].swapped():
        ...     output = model(torch.zeros(1, 2))
    """

    def __init__(self, core: Core, name: str, *, owner: object) -> None:
        self._core = core
        self._given_name = name
        self._given_owner = owner

    @property
    def name(self) -> str:
        """Its name."""
        return self._given_name

    @property
    def _owner(self) -> object:
        """The object that the user holds: a copy of a model that refers to it leaves it out."""
        return self._given_owner

    @property
    def profile(self) -> Profile:
        """How past weights count in this average."""
        return self._core.profiles[self.name]

    def swapped(self) -> AbstractContextManager[None]:
        """The average stands in the source inside of the `with`; after it, the source's weights are back, bit for bit.

        Values are exchanged in place: no tensor is replaced or moved, so compiled models see the average. It takes no
        memory where the average has the source's dtype, or the source is bfloat16 and its average float32; float16
        sources, and averages on another device, take a copy of the source, but those on the host of a model on an
        accelerator have room for it there. Buffers that are written inside (BatchNorm statistics, say) stay with the
        average. The train or eval mode is left alone.

        Raises:
            StateError: an average stands in the source already; or, at the end, a parameter was changed inside. The
                source's weights are back then, too.
        """
        return swapped(self._core, self.name)

    def swap_in(self) -> None:
        """Puts the average into the source until `swap_out`, for callers that cannot use `with swapped()`.

        Raises:
            StateError: an average stands in the source already.
        """
        check_not_standing(self._core.source.bare, "swap_in()")
        try:
            swap_in(self._core, self.name)
        except BaseException:
            swap_out(self._core)
            raise

    def swap_out(self) -> None:
        """Puts the source's own weights back; where no average stands in the source, does nothing.

        Raises:
            StateError: a parameter was changed meanwhile; the source's weights are back all the same. Or it is another
                average that stands in the source.
        """
        if self._core.swapped not in (None, self.name):
            raise StateError(f"swap_out() of {self.name!r}: the average {self._core.swapped!r} stands in the model")
        raise_if_changed(swap_out(self._core))

    def weights(self) -> dict[str, Tensor]:
        """The average as a dictionary that loads strictly into the bare model; its tensors are copies.

        Where the model is sharded they are whole, put together from all ranks, each of which must call this.
        Each name of a tied tensor has the same tensor. Entries that are not averaged are there as they are in the
        source, and so is what modules give by `get_extra_state`; non-persistent buffers are not.
        """
        core = self._core
        with agreed(core, "weights()", self.name):
            core.verify()
            check_can_be_whole(core, "weights()")
        tensors = by_every_name(core, core.store.tensors(self.name))
        return tensors | extra_states(core.source.model)

    def write_back(self) -> None:
        """Writes the average into the source for good; training goes on from it, and the average is kept.

        The optimizer's state is left as it is.

        Raises:
            StateError: an average stands in the source.

        Source: Li et al., Switch EMA: a free lunch for better flatness and sharpness, 2024.
        """
        self.copy_to(self._core.source.model)

    def copy_to(self, model: nn.Module) -> None:
        """Writes the average into a model of the same structure, in the model's own dtypes.

        Args:
            model: any module with the same tensors, bare or wrapped; where it is the source, its weights are lost.

        Raises:
            MismatchError: the model has other tensors; or ranks that share averages gave models of other dtypes or
                orders in memory. Nothing has changed.
            StateError: an average stands in the source.
        """
        core = self._core
        with agreed(core, "copy_to()", self.name, sends=core.store.shares.mesh is not None) as targets:
            check_not_standing(core.source.bare, "copy_to()")
            core.verify()
            entries = core.source.entries
            found = match_sites(model, entries, given_by="the given model")
            targets |= {entry.name: local(found[entry.name][0].tensor) for entry in entries}
        tensors = core.store.tensors(self.name)
        with torch.no_grad():
            core.store.write_to(
                targets,
                {entry.name: tensors.get(entry.name, entry.local) for entry in entries},
            )

    def module(self, dtype: torch.dtype | None = None) -> nn.Module:
        """An independent copy of the bare model, in eval mode, with the averaged weights.

        Args:
            dtype: of its floating-point tensors. Default: as in the source.

        Raises:
            StateError: the model is sharded, or cannot be copied, or its copy would read the trained weights; `swapped`
                always works.
        """
        core = self._core
        if dtype is not None:
            check_floating_point(dtype)
        self._check_whole("module()")
        with agreed(core, "module()", self.name, dtype, sends=core.store.shares.mesh is not None):
            core.verify()
        tensors = core.store.tensors(self.name)
        copies: dict[str, Tensor] = {}
        for entry in core.source.entries:
            wanted = entry.tensor.dtype if dtype is None or not entry.tensor.is_floating_point() else dtype
            kept = tensors.get(entry.name, entry.tensor).detach()
            if entry.name in core.store.wholes:
                copies[entry.name] = torch.empty_like(entry.tensor.detach(), dtype=wanted, device=kept.device)
            else:
                copies[entry.name] = kept.to(wanted, copy=True)
        core.store.write_to({name: copies[name] for name in core.store.wholes}, tensors)
        return build_module(core.source.bare, core.source.entries, copies, owners=(self._owner, core))

    def _check_whole(self, call: str) -> None:
        check_can_be_whole(self._core, call)
        sharded = list(self._core.source.shardings)
        if sharded:
            raise StateError(
                f"{call} of a model that is sharded over ranks ({listed(sharded)}): what gathers its parts would go on "
                "gathering those of the trained model. Use `with average.swapped(): ...`; or load average.weights(), "
                "which is whole, into a model that is not sharded"
            )

    def live_module(self) -> nn.Module:
        """A copy of the bare model, in eval mode, whose tensors are the average's own, and so follow every update.

        It is what a teacher needs. Its dtype is the average's (float32 for a source of 16 bits), frozen parameters
        are the source's own, and it must not be moved or cast. Moving it is an error at the next update.

        Raises:
            StateError: the model cannot be copied, or its copy would read the trained weights; or an average stands in
                the source.
        """
        core = self._core
        check_not_standing(core.source.bare, "live_module()")
        self._check_whole("live_module()")
        if core.store.shares.mesh is not None:
            raise StateError(
                "live_module() with shard_over=: each rank has its share of the average only. module() puts it together"
            )
        core.verify()
        tensors = core.store.tensors(self.name)
        module = build_module(core.source.bare, core.source.entries, tensors, owners=(self._owner, core))
        core.live[module] = Watch(module)
        core.lends = True
        return module

    def export(self, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
        """Writes the average to a safetensors file for others to load, whole or not at all.

        The file has the names of `weights()`. Of a model with peft adapters only the active adapter is written, in
        peft's own form; where `path` is a directory, it is one that `PeftModel.from_pretrained` loads.

        Where the model is sharded, every rank must call this: all of them return, or all of them raise. The first rank
        of the mesh writes, and the tensors are put together one by one.

        Args:
            path: the file; or the directory of an adapter, which must exist.
            dtype: of its floating-point tensors. Default: the average's.

        Raises:
            OSError: the file cannot be written; one that was there is as it was.
            ValueError: the name is one for files of another kind, a dtype is unknown to the format, or a number is too
                large for `dtype`.
            StateError: a frozen parameter has changed; or another rank raised an error.
        """
        export(self._core, self.name, path, dtype=dtype)
