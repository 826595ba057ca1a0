"""What a conversion writes from: sets of tensors, cast once and tied as in the file; updates made; the decay."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from polyak.errors import MismatchError, listed, outside
from polyak.files.checkpoints import Checkpoint, Tensors
from polyak.files.containers import Leaf
from polyak.files.layouts import BY_NAME, Layout, Note
from polyak.kernels import cast_floating_point, is_plain
from polyak.model import gather, unwrap
from polyak.profiles import Exponential


def layout_of(checkpoint: Checkpoint) -> Layout:
    """The layout that a file was read by."""
    return BY_NAME[checkpoint.format]


def num_updates(checkpoint: Checkpoint) -> int | None:
    """How many updates the average has had, if the file tells."""
    count = checkpoint.counters.get(layout_of(checkpoint).updates or "")
    return int(count) if count is not None and math.isfinite(count) and count >= 0 else None


def num_copies(checkpoint: Checkpoint) -> int | None:
    """The number of updates for a library whose first update is a copy: 0 only if that was still to come here."""
    count = num_updates(checkpoint)
    return count if count is None or layout_of(checkpoint).begins_with_copy else max(count, 1)


def decay_of(checkpoint: Checkpoint, average: str) -> float | None:
    """What the average keeps of itself at an update, where that is known and stays the same."""
    profile = checkpoint.profiles.get(average)
    if checkpoint.decay is not None or not isinstance(profile, Exponential) or profile.debias:
        return checkpoint.decay
    time, count = checkpoint.counters.get("time"), num_updates(checkpoint)
    between = time / count if time and count else 1
    return profile.decay if between == 1 else math.exp(-profile.rate * between)


def diffusers_fields(checkpoint: Checkpoint) -> Mapping[str, int | float] | None:
    """What diffusers says of its average, if it wrote the file."""
    return checkpoint.counters if layout_of(checkpoint).updates == "optimization_step" else None


def warm_up(checkpoint: Checkpoint) -> int | None:
    """The s of the last update, if decays are min(decay, (1 + s) / (10 + s)); None if they are not."""
    layout, counters = layout_of(checkpoint), checkpoint.counters
    count = num_updates(checkpoint)
    if not layout.warms_up or count is None:
        return None
    if diffusers_fields(checkpoint) is None:
        return count
    # A least decay that is the decay itself leaves nothing of the warm-up.
    is_constant = checkpoint.decay is not None and counters.get("min_decay", 0) >= checkpoint.decay
    if counters.get("use_ema_warmup") or is_constant:
        return None
    return max(count - int(counters.get("update_after_step", 0)) - 1, 0)


@dataclass(kw_only=True)
class Material:
    """What a conversion writes from.

    Attributes:
        checkpoint: what was read.
        chosen: the name of its average that is converted.
        average: by name; tied names have the same tensor.
        raw: the weights that are trained, by name, where the file has them. What the file has in both is the same
            tensor here.
        order: names of the parameters, where the layout to write is positional.
        decay: as the caller gave it.
        config: of the model, where the layout to write is a folder.
        has_model: whether the caller gave the model.
        notes: what the account says.
    """

    checkpoint: Checkpoint
    chosen: str
    average: Mapping[str, Tensor]
    raw: Mapping[str, Tensor] | None
    order: Sequence[str] = ()
    decay: float | None = None
    config: Mapping[str, object] | None = None
    has_model: bool = False
    notes: list[Note] = field(default_factory=list[Note])

    def note(self, text: str, *, needs: tuple[str, ...] = ()) -> None:
        """Adds a note."""
        self.notes.append(Note(text, needs=needs))


class Maker:
    """Makes each tensor of a file once: cast, and by itself, so that nothing else of its storage is written."""

    def __init__(self, path: str | os.PathLike[str], dtype: torch.dtype | None) -> None:
        self._path = path
        self._dtype = dtype
        self._made: dict[Leaf, Tensor] = {}

    def tensors(self, given: Tensors, prefix: str) -> Mapping[str, Tensor]:
        """The tensors of a set, made when they are used. Names that are tied in the file have the same tensor."""
        return _Made({f"{prefix}{name}": (given, name) for name in given}, self)

    def cast(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor in the dtype that was chosen, where it is floating-point.

        Raises:
            ValueError: a number in it is too large for the dtype.
        """
        what = f"{name!r} of {os.fspath(self._path)!r}"
        return tensor if self._dtype is None else cast_floating_point(tensor, self._dtype, what=what)

    def tensor(self, given: Tensors, name: str) -> Tensor:
        """A tensor of a set."""
        leaf = given.leaf(name)
        if leaf not in self._made:
            tensor = given[name]
            made = self.cast(name, tensor)
            is_whole = made.untyped_storage().nbytes() == made.numel() * made.element_size()
            self._made[leaf] = made if is_whole else made.clone()
        return self._made[leaf]


class _Made(Mapping[str, Tensor]):
    def __init__(self, places: Mapping[str, tuple[Tensors, str]], maker: Maker) -> None:
        self._places = places
        self._maker = maker

    def __getitem__(self, name: str) -> Tensor:
        return self._maker.tensor(*self._places[name])

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def complete(material: Material, model: nn.Module | None, maker: Maker, *, with_raw: bool) -> None:
    """Makes the sets whole: each takes what it lacks from the other, and the model gives what is in neither.

    Args:
        material: both sets. The average is whole then; so are the raw weights, where the file has them and they are
            written.
        model: the model, where one was given.
        maker: of the tensors.
        with_raw: whether the raw weights are written as well. If not, they only give what the average lacks.

    Raises:
        MismatchError: what is in neither is trained, so that the model's own is no average.
    """
    average, raw, path = material.average, material.raw or {}, str(material.checkpoint.path)
    copied = [name for name in raw if name not in average]
    if copied:
        material.note(f"not averaged, and as in the raw weights: {listed(copied)}")
    elif layout_of(material.checkpoint).is_positional and model is None:
        material.note(
            "the input has parameters only, each under one name: buffers and tied names, if the model has any, are "
            "not in it",
            needs=("model",),
        )
    added = [name for name in average if name not in raw] if raw and with_raw else []
    if added:
        material.note(f"not in the raw weights, and as in the average: {listed(added)}")
    from_model = {} if model is None else _of_model(model, {*raw, *average}, maker, path)
    if from_model:
        warnings.warn(
            f"{path!r} has no {listed(from_model)}, which no optimizer trains: written as in the model that was given, "
            "which has to be the one that was trained",
            stacklevel=outside(),
        )
        material.note(f"as in the model that was given: {listed(from_model)}")
    order = dict.fromkeys([*raw, *average])
    material.average = {name: (average if name in average else raw)[name] for name in order} | from_model
    if material.raw is not None:
        material.raw = {name: (raw if name in raw else average)[name] for name in order if with_raw} | from_model


def _of_model(model: nn.Module, known: Set[str], maker: Maker, path: str) -> dict[str, Tensor]:
    """The tensors of a model that are not known, after it is certain that nothing of them is trained."""
    sites = [site for group in gather(unwrap(model)) for site in group if site.persistent and site.name not in known]
    trained = [site.name for site in sites if site.tensor.requires_grad or not is_plain(site.tensor)]
    if trained:
        raise MismatchError(f"the model has {listed(trained)}, and {path!r} does not; give the model that was averaged")
    return {site.name: maker.cast(site.name, site.tensor.detach().cpu().clone()) for site in sites}


def order_of(
    material: Material,
    tensors: Tensors,
    *,
    prefix: str,
    names: Sequence[str] | None,
    model: nn.Module | None,
) -> list[str]:
    """The names of the parameters, in the order in which a positional layout has them.

    Raises:
        MismatchError: nobody says what is a parameter, or the file lacks one.
    """
    known = {*(material.raw or {}), *material.average}
    if layout_of(material.checkpoint).is_positional:
        order = [f"{prefix}{name}" for name in _once(tensors)]
    elif model is not None:
        order = [group[0].name for group in gather(unwrap(model)) if group[0].is_parameter]
    elif names is not None:
        order = list(names)
    else:
        raise MismatchError(
            f"the tensors of torch_ema go by their positions among the model's parameters, and {len(tensors)} names in "
            f"{str(material.checkpoint.path)!r} do not tell which are parameters, and in what order",
            needs=("model", "names"),
        )
    unknown = [name for name in order if name not in known]
    if unknown:
        raise MismatchError(
            f"{str(material.checkpoint.path)!r} has no {listed(unknown)}; the names must be those of what it averages"
        )
    copied = [name for name in order if name not in material.average]
    if copied:
        material.note(f"not averaged, and as in the raw weights: {listed(copied)}")
    return order


def _once(tensors: Tensors) -> list[str]:
    """The names of tensors, of tied ones the first."""
    found: dict[Leaf, str] = {}
    for name in tensors:
        found.setdefault(tensors.leaf(name), name)
    return list(found.values())


def first_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under one name each, of tied ones the first."""
    found: dict[int, str] = {}
    for name, tensor in tensors.items():
        found.setdefault(id(tensor), name)
    return {name: tensors[name] for name in found.values()}


def separate(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The same tensors; where one comes again, a copy of it."""
    seen: set[int] = set()
    found: list[Tensor] = []
    for tensor in tensors:
        found.append(tensor.clone() if id(tensor) in seen else tensor)
        seen.add(id(tensor))
    return found
