"""`WeightAverage`: averages of a model's weights, kept while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from polyak.errors import StateError, listed
from polyak.kernels import Plan
from polyak.model import Rules, Source, check_not_standing
from polyak.profiles import Profile, named_profiles
from polyak.ranks import all_or_none, meshes_of
from polyak.store import Modes, Shares, Store

from .agreement import agreed, check_alike, check_in_sync
from .attach import Attachment, check_optimizers
from .average import Average
from .clock import make_clock
from .core import Core, NonFinite
from .export import raw_weights
from .report import Report, make_report
from .state import load_state, save_state
from .swapped import raise_if_changed, swap_out

_ADAPT = ". Where the model was changed on purpose, adapt() follows it; a new model needs a new average"


class WeightAverage(Average):
    """Averages of a model's weights, by one profile or several, updated in one pass.

        average = average + weight * (source - average),    weight = 1 - g(previous) / g(now)

    Averages are plain tensors by name, beside the model: they are no parameters, belong to no module, and know no
    wrapper. Floating-point and complex parameters are averaged, in float32 where the source has 16 bits; so are
    floating-point buffers such as the statistics of a BatchNorm. Integers, booleans, non-persistent buffers and the
    singular vectors of a spectral norm are copied at each update. Frozen parameters are left where they are.
    `report()` says what is done to which tensor, and `rules` changes it.

    With one profile it is an average itself. With several, `average[name]` is each of them.

    Of a model that is sharded over ranks (`fully_shard`, tensor parallel, HSDP) each rank averages the parts that it
    has, with the bits that one process would get. Every rank makes the same calls; `update()` and `swapped()` send
    nothing, `weights()`, `raw_weights()` and `export()` put tensors together.

    Args:
        model: the module being trained, bare or wrapped (torch.compile, DataParallel, DDP, checkpointing).
        profile: how past weights count; or several, by name. The default keeps the mean age of the weights at 11 % of
            the run so far, however long it gets, and so has no length to tune.
        every: how many calls of `update` make one update, which weighs as much as all of them: the same as if the
            source had stood still between.
        start: from when on to average, in units of the time axis; until then each update copies the source. The
            profiles' time begins there.
        rules: what to do with tensors that the defaults do not suit: `{"*.expert_bias": "average",
            torch.nn.BatchNorm2d: "copy"}`; the first match wins. Keys are patterns of names, classes of modules, or
            functions of name and tensor; actions are average, copy and skip.
        dtype: of the averages. Default: the source's; float32 for 16-bit sources. In torch.bfloat16 and torch.float16
            they are rounded stochastically, so that they move and are right in the mean; complex ones stay complex64.
        compensated: keep what float32 averages are short of in a second term, 2 bytes a number, so that they get 65,536
            times nearer to their sources: for decays above 0.9999 and runs of many updates.
        seed: of stochastic rounding. The same seed, updates and names give the same bits.
        device: where the averages are. Default: where the source is. On the "cpu" they follow a model on an accelerator
            beside its training (docs/host.md): reading waits, and `wait()` does; a step only where others train along.
        shard_over: divide the averages among these data-parallel ranks, so that each keeps and updates its share of
            every large tensor: torch's process group, or a dimension of a mesh over which the model is replicated, as
            in `mesh["replicate"]`. Swaps, exports, and all that gives whole tensors then need every rank.
        nonfinite: what to do when the source holds a NaN or an infinity, which would stay in the average for ever.
            "raise" raises, on a GPU at the next call; "skip" leaves the update out, exactly as if it had not been due.
            Both read the weights once more, which makes an update up to three quarters longer, so that "propagate",
            which takes the weights as they are, is the default. The ranks of a sharded model agree, by a message of 4
            bytes at each update, the only one that is ever sent there, and wait for it.

    Raises:
        StateError: there is nothing to average, or a tensor that cannot be averaged or, among these ranks, divided; or
            another average stands in the model.
        TypeError: `shard_over` is no process group and no mesh.
        MismatchError: two tensors of the model share memory without being the same tensor; or ranks over which the
            model or its averages are sharded have another model or other arguments.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> average = WeightAverage(model)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(8, 4)).square().mean().backward()
        ...     optimizer.step()
        ...     average.update()
        >>> with average.swapped():
        ...     loss = model(torch.randn(8, 4)).square().mean()
        >>> sorted(average.weights())
        ['bias', 'weight']

    Source: Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models, 2024, equation 119.
    """

    def __init__(
        self,
        model: nn.Module,
        profile: Profile | Mapping[str, Profile] | None = None,
        *,
        every: int = 1,
        start: float = 0.0,
        rules: Rules | None = None,
        dtype: torch.dtype | None = None,
        compensated: bool = False,
        seed: int = 0,
        device: torch.device | str | None = None,
        shard_over: Any = None,
        nonfinite: NonFinite = "propagate",
    ) -> None:
        # Average.__init__ is not called: name and owner are properties here, so that the object does not hold itself.
        if nonfinite not in get_args(NonFinite):
            raise ValueError(f"nonfinite={nonfinite!r}: it is one of {', '.join(map(repr, get_args(NonFinite)))}")
        profiles = named_profiles(profile)
        clock = make_clock(every=every, start=start)
        source = Source(model, rules or {}, any_device=device is not None, hint=_ADAPT)
        check_not_standing(source.bare, "WeightAverage()")
        modes = Modes(dtype, compensated, seed)
        if source.flat_rank is not None and (modes.is_stochastic or nonfinite != "propagate" or shard_over is not None):
            raise StateError(
                f"dtype={dtype}, nonfinite={nonfinite!r}, shard_over={shard_over!r}: under FullyShardedDataParallel "
                "averages are not kept in 16 bits, not looked at for NaNs, and not shared; leave out what of these was "
                "given, or shard the model by fully_shard (FSDP2)"
            )
        shares = Shares(shard_over, source.entries)
        # It takes memory, and a rank which has none must say so before others compare themselves with it.
        with all_or_none(meshes_of(map(shares.sharding_of, source.entries)), "WeightAverage()"):
            store = Store(
                source.entries,
                profiles,
                modes=modes,
                device=None if device is None else torch.device(device),
                shares=shares,
                looks=nonfinite != "propagate",
            )
            self._core = Core(profiles, clock, source, store, nonfinite=nonfinite)
        check_alike(self._core)

    @property
    def name(self) -> str:
        """The name of the only average that is kept.

        Raises:
            StateError: there are several.
        """
        first, *others = self._core.profiles
        if others:
            raise StateError(f"{listed([first, *others])} are all kept here: say which one, as average[{first!r}]")
        return first

    @property
    def _owner(self) -> WeightAverage:
        return self

    @property
    def profiles(self) -> dict[str, Profile]:
        """The profiles by name; a single one is called "average"."""
        return dict(self._core.profiles)

    @property
    def num_updates(self) -> int:
        """How many updates were made."""
        return self._core.num_updates

    @property
    def time(self) -> float:
        """The time of the last call of `update`, in units of the time axis."""
        return self._core.clock.time

    @property
    def plan(self) -> Plan:
        """Which tensor is updated by which kernel, and why; print it. POLYAK_KERNELS chooses among the kernels.

        Example:
            >>> plan = WeightAverage(nn.Linear(2, 2)).plan
            >>> kernel, _, what = str(plan).partition(": ")
            >>> print(what)  # doctest: +ELLIPSIS
            2 tensors, 6 elements (...): weight, bias
        """
        return self._core.store.updates.plan

    @property
    def is_swapped(self) -> bool:
        """Whether an average stands in the source at the moment."""
        return self._core.swapped is not None

    def __getitem__(self, name: str) -> Average:
        if name not in self._core.profiles:
            raise KeyError(f"{name!r} is none of the averages kept here: {listed(self._core.profiles)}")
        return Average(self._core, name, owner=self)

    def update(self, *, at: float | None = None) -> None:
        """Takes the source's weights into every average. Call it after `optimizer.step()`.

        Args:
            at: the time now, such as the number of images or tokens seen so far, where that and not the number of
                calls is the time axis. It must advance, and is given at every call or at none.

        Raises:
            MismatchError: the model's tensors are not those that the average was made for. No average has changed.
            StateError: an average stands in the source, the time axis changed, or an earlier update failed.
            ValueError: time does not advance.
        """
        core = self._core
        check_not_standing(core.source.bare, "update()")
        if core.attachment is not None:
            raise StateError(
                "update() where an optimizer is attached would count twice; detach it, or leave update() out"
            )
        core.update(at)

    def wait(self) -> None:
        """Waits until every update is in the averages: those on the host follow `update()` beside the training.

        Raises:
            StateError: an update failed there, or the model held what `nonfinite="raise"` raises for.
        """
        self._core.wait()

    def advance(self, *, at: float | None = None) -> None:
        """Ticks the clock for an update that is captured in a CUDA graph: call it before the capture and each replay.

        The `update()` in the graph applies, at each replay, the growth that `advance` handed to the device, whatever
        it is by then. Nothing waits for the device. It needs the kernel in Triton, for all tensors.

            average.advance()
            with torch.cuda.graph(graph):
                loss = train_step()
                average.update()
            graph.replay()
            for _ in range(num_steps - 1):
                average.advance()
                graph.replay()

        Args:
            at: the time after the step, as in `update`.

        Raises:
            StateError: a device cannot decide about the updates of this average. Or, with `nonfinite="raise"`: the
                model was not finite in an earlier replay, which is known at the second `advance` after it, or at
                `wait`.
        """
        core = self._core
        check_not_standing(core.source.bare, "advance()")
        core.advance(at)

    def attach(self, *optimizers: Optimizer, at: Callable[[], float] | None = None) -> Attachment:
        """Updates by itself from now on, after each step that the optimizers really make.

        Gradient accumulation needs no thought, nor does a `GradScaler`: what it skips is no step. With several
        optimizers, an update follows when each has made a step since the last.

        Args:
            optimizers: one or more.
            at: gives the time after a step, where that is not the number of steps.

        Returns:
            A handle, whose `detach()` ends it.

        Raises:
            StateError: an optimizer is attached already.
            ValueError: an optimizer trains another model.

        Example:
            >>> model = nn.Linear(2, 2)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> average = WeightAverage(model)
            >>> handle = average.attach(optimizer)
            >>> model(torch.ones(1, 2)).sum().backward()
            >>> optimizer.step()
            >>> average.num_updates
            1
        """
        core = self._core
        if core.attachment is not None:
            raise StateError("an optimizer is attached already; detach it first, or attach all of them in one call")
        check_optimizers(optimizers, {id(entry.tensor) for entry in core.source.entries}, at)

        def after_round() -> None:
            check_not_standing(core.source.bare, "optimizer.step()")
            core.update(None if at is None else at())

        def on_detach() -> None:
            core.attachment = None

        core.attachment = Attachment(tuple(dict.fromkeys(optimizers)), after_round, on_detach)
        return core.attachment

    def reset(self) -> None:
        """Begins again, at time 0, with the source's weights as they are."""
        check_not_standing(self._core.source.bare, "reset()")
        self._core.reset()

    def adapt(self) -> None:
        """Follows a model whose tensors were added, removed or reshaped on purpose.

        Tensors that are as they were keep their averages; others begin as the source is. Time goes on.

        Raises:
            StateError: an average stands in the source, or a live module shares the old tensors; or tensors lie
                otherwise over the ranks than their averages.
        """
        check_not_standing(self._core.source.bare, "adapt()")
        self._core.adapt()

    def swap_out(self) -> None:
        """Puts the source's own weights back, whichever average stands there; else does nothing.

        Raises:
            StateError: a parameter was changed meanwhile; the source's weights are back all the same.
        """
        raise_if_changed(swap_out(self._core))

    def raw_weights(self) -> dict[str, Tensor]:
        """The source's own weights, also while an average stands in it: a dictionary that loads strictly, of copies."""
        return raw_weights(self._core)

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on: averages, copies, clock and configuration.

        Its tensors are the averages themselves, as in every state_dict of torch; copy them to keep them. Where the
        model is sharded they are DTensors of its placements, which torch.distributed.checkpoint saves, and loads on any
        other number of ranks:

            torch.distributed.checkpoint.save({"average": average}, checkpoint_id=path)
            torch.distributed.checkpoint.load({"average": average}, checkpoint_id=path)

        A checkpoint of another configuration has none of the keys that are looked for, so that loading it raises before
        anything is written.
        """
        self._core.verify_values()
        if not self._core.store.meshes:
            # Of a sharded model it may as well be what torch.distributed.checkpoint is about to load into.
            self._core.warn_if_never_updated("saved")
        return save_state(self._core)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state, bit for bit, in the tensors that are here.

        Raises:
            FileFormatError: it is no state of a WeightAverage.
            MismatchError: the state is of another model. Nothing has changed.
            StateError: the state is of another configuration, or an average stands in the source.
        """
        check_not_standing(self._core.source.bare, "load_state_dict()")
        self._core.check_live()
        load_state(self._core, state)

    def check_in_sync(self, *, buffers: bool = True, group: Any = None) -> None:
        """Compares the averages of all ranks, bit for bit; nothing else does, because no update sends a message.

        Every rank must call it, and waits for the others. It reads all averages, and sends 16 bytes of each tensor.
        Parts of a sharded model are compared where ranks have the same ones. Without torch.distributed it does nothing.

        Args:
            buffers: compare these too. DistributedDataParallel lets each rank have its own.
            group: the ranks, as torch's process group. Default: all.

        Raises:
            MismatchError: ranks have different averages, or made different updates; every rank raises it.
        """
        check_in_sync(self._core, buffers=buffers, group=group)

    def report(self, *, total: float | None = None) -> Report:
        """What was done so far, and what is done to which tensor; print it.

        Where the model or its averages are sharded, every rank must call it, and gets the same but for its own bytes.

        Args:
            total: the planned length of the run, in units of the time axis; warns where an average is longer.

        Raises:
            MismatchError: the model's tensors are not those that the average was made for.
        """
        with agreed(self._core, "report()"):
            self._core.verify()
        return make_report(self._core, total=total)

    def __repr__(self) -> str:
        profiles = ", ".join(f"{name!r}: {profile!r}" for name, profile in self._core.profiles.items())
        return f"<WeightAverage of {profiles} after {self.num_updates} updates>"
