"""`WeightAverage`: averages of a model's weights, kept while it trains."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from polyak.clock import Clock
from polyak.core import Core
from polyak.entries import Rules
from polyak.errors import StateError, listed
from polyak.profiles import Power, Profile
from polyak.report import Report, make_report
from polyak.source import Source
from polyak.state import load_state, save_state
from polyak.store import LocalStore, Step
from polyak.swapping import check_not_standing
from polyak.view import AverageView

_ONLY = "average"


class WeightAverage:
    """Averages of a model's weights, by one profile or several, updated in one pass.

        average = average + weight * (source - average),    weight = 1 - g(previous) / g(now)

    Averages are plain tensors by name, beside the model: they are no parameters, belong to no module, and know no
    wrapper. Floating-point and complex parameters are averaged, in float32 where the source has 16 bits; so are
    floating-point buffers such as the statistics of a BatchNorm. Integers, booleans, non-persistent buffers and the
    singular vectors of a spectral norm are copied at each update. Frozen parameters are left where they are.
    `report()` says what is done to which tensor, and `rules` changes it.

    Args:
        model: the module being trained, bare or wrapped (torch.compile, DataParallel, DDP, checkpointing).
        profile: how past weights count; or several, by name. The default keeps the mean age of the weights at 11 % of
            the run so far, however long it gets, and so has no length to tune.
        every: how many calls of `update` make one update; what is left out stays exact for a constant source.
        start: from when on to average, in units of the time axis; until then each update copies the source.
        rules: what to do with tensors that the defaults do not suit: `{"*.expert_bias": "average",
            torch.nn.BatchNorm2d: "copy"}`; the first match wins. Keys are patterns of names, classes of modules, or
            functions of name and tensor; actions are average, copy and skip.
        dtype: of the averages, torch.float32 or torch.float64. Default: the source's; float32 for 16-bit sources.
        device: where the averages are. Default: where the source is.

    Raises:
        StateError: there is nothing to average, or a tensor that cannot be averaged.
        MismatchError: two tensors of the model share memory without being the same tensor.

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
        device: torch.device | str | None = None,
    ) -> None:
        profiles = _named_profiles(profile)
        clock = Clock(every=every, start=float(start))
        source = Source(model, rules or {}, any_device=device is not None)
        store = LocalStore(
            source.entries, profiles, dtype=dtype, device=None if device is None else torch.device(device)
        )
        self._core = Core(profiles, clock, source, store)

    @property
    def profiles(self) -> dict[str, Profile]:
        """The profiles by name; a single one is called "average"."""
        return dict(self._core.profiles)

    @property
    def num_updates(self) -> int:
        """How many updates were made."""
        return self._core.clock.num_updates

    @property
    def time(self) -> float:
        """The time of the last call of `update`, in units of the time axis."""
        return self._core.clock.time

    @property
    def is_swapped(self) -> bool:
        """Whether an average stands in the source at the moment."""
        return self._core.swapped is not None

    def __getitem__(self, name: str) -> AverageView:
        if name not in self._core.profiles:
            raise KeyError(f"{name!r} is none of the averages kept here: {listed(self._core.profiles)}")
        return AverageView(self._core, name, owner=self)

    def update(self, *, at: float | None = None) -> None:
        """Takes the source's weights into every average. Call it after `optimizer.step()`.

        Args:
            at: the time now, such as the number of images or tokens seen so far, where that and not the number of
                calls is the time axis. It must advance, and is given at every call or at none.

        Raises:
            MismatchError: the model's tensors are not those that the average was made for. No average has changed.
            StateError: an average stands in the source, or the time axis changed.
            ValueError: time does not advance.
        """
        core = self._core
        check_not_standing(core.source.bare, "update()")
        clock = core.clock.tick(at)
        if clock.num_updates > core.clock.num_updates:
            growth = {name: clock.growth(profile, core.clock.updated_at) for name, profile in core.profiles.items()}
            core.follow_source()
            core.store.submit(Step(growth, clock.num_updates))
        core.clock = clock

    # What can be done with one average. With several, `average[name]` does the same.

    def _only(self) -> AverageView:
        first, *others = self._core.profiles
        if others:
            raise StateError(f"{listed([first, *others])} are all kept here: say which one, as average[{first!r}]")
        return self[first]

    @contextmanager
    def swapped(self) -> Generator[None, None, None]:
        """The average stands in the source, in place, inside of the `with`; see `AverageView.swapped`."""
        with self._only().swapped():
            yield

    def weights(self) -> dict[str, Tensor]:
        """The average as a dictionary that loads strictly into the bare model; see `AverageView.weights`."""
        return self._only().weights()

    def copy_to(self, model: nn.Module) -> None:
        """Writes the average into a model; see `AverageView.copy_to`."""
        self._only().copy_to(model)

    def module(self, dtype: torch.dtype | None = None) -> nn.Module:
        """An independent copy of the bare model with the averaged weights; see `AverageView.module`."""
        return self._only().module(dtype)

    def live_module(self) -> nn.Module:
        """A module whose tensors are the average's own; see `AverageView.live_module`."""
        return self._only().live_module()

    def export(self, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
        """Writes the average to a safetensors file; see `AverageView.export`."""
        self._only().export(path, dtype=dtype)

    # Restart.

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on: averages, copies, clock and configuration.

        Its tensors are the averages themselves, as in every state_dict of torch; copy them to keep them.
        """
        self._core.verify()
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

    def report(self) -> Report:
        """What was done so far, and what is done to which tensor; print it.

        Raises:
            MismatchError: the model's tensors are not those that the average was made for.
        """
        self._core.verify()
        return make_report(self._core)

    def __repr__(self) -> str:
        profiles = ", ".join(f"{name!r}: {profile!r}" for name, profile in self._core.profiles.items())
        return f"<WeightAverage of {profiles} after {self.num_updates} updates>"


def _named_profiles(profile: Profile | Mapping[str, Profile] | None) -> dict[str, Profile]:
    if profile is None:
        return {_ONLY: Power(relative_std=0.10)}
    named = cast("dict[object, object]", dict(profile) if isinstance(profile, Mapping) else {_ONLY: profile})
    if not named:
        raise ValueError("profile={}: at least one profile is needed, such as polyak.Power(relative_std=0.10)")
    for name, value in named.items():
        if not isinstance(value, Profile):
            hint = f"; for a decay, polyak.Exponential({value!r})" if isinstance(value, float) else ""
            raise TypeError(f"profile: {value!r} is not a profile, such as polyak.Power(relative_std=0.10){hint}")
        if not isinstance(name, str) or not name or not name.isprintable():
            raise ValueError(f"profile: {name!r} is not a name for an average")
    return cast("dict[str, Profile]", named)
