"""The account of a file: what the layouts found in it, and what its numbers say."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from polyak.errors import listed
from polyak.files.containers import Leaf, Reader, leaves_of
from polyak.files.containers import verify as verify_files
from polyak.files.layouts import Found, Note
from polyak.profiles import Exponential, Power, Profile, Uniform, profile_from_description

from .account import BUDGET, Account, ProfileAccount, Reading, WeightSet
from .comparison import distances, is_looked_at, look, nonfinite, rows
from .contents import Contents

_RAW = "raw"
_MAX_TIME = 1 << 63


def inspect(
    found: Found,
    *,
    budget: int = BUDGET,
    verify: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Account:
    """What can be said of a file.

    Args:
        found: what `polyak.files.layouts.examine` found in it.
        budget: how many bytes of tensors are read at most, about. Where there are more, a few stretches of each tensor
            are read, and what is said of the numbers is an estimate.
        verify: whether everything is read instead, and compared with the checksums in the files.
        progress: told after each part how many bytes were read, and of how many.

    Raises:
        FileFormatError: the file has become shorter since it was opened.
        OSError: it cannot be read.

    Example:
        >>> import tempfile, torch
        >>> from polyak.files.layouts import examine
        >>> path = f"{tempfile.mkdtemp()}/checkpoint.pth"
        >>> torch.save({"state_dict": {"w": torch.ones(3)}, "state_dict_ema": {"w": torch.zeros(3)}}, path)
        >>> account = inspect(examine(path))
        >>> account.format, [each.name for each in account.sets], account.distances[0].relative
        ('timm', ['average', 'raw'], 1.0)
    """
    content = found.content
    raw = _free_name(found.averages)
    sets: dict[str, Mapping[str, Leaf]] = {**found.averages, **({raw: found.raw} if found.raw else {})}
    used = [leaf for tensors in sets.values() for leaf in tensors.values()]
    contents = Contents(content.tree)
    compared = rows(sets)
    total = sum(row.num_bytes for row in compared)
    paths = _files([*contents.leaves, *used], content.path)
    whole = total + sum(path.stat().st_size for path in paths) if verify else min(total, budget)
    step = None if progress is None else _Progress(progress, whole).add
    with Reader(in_order=verify or total <= budget) as reader:
        look(reader, compared, raw=raw, budget=None if verify else budget, progress=step)
    verification = verify_files(paths, progress=step) if verify else None
    if progress is not None:
        progress(whole, whole)
    half_life, mean_age = _ages_of_decay(found.decay)
    return Account(
        path=os.fspath(content.path),
        kind=content.kind,
        format=found.layout.name,
        writer=found.layout.writer,
        num_bytes=content.num_bytes,
        sets=tuple(
            _set(name, tensors, contents, content.path, is_average=name != raw) for name, tensors in sets.items()
        ),
        counters=dict(found.counters),
        decay=found.decay,
        half_life=half_life,
        mean_age=mean_age,
        profiles=_profiles(found),
        has_names=found.has_names,
        missing=found.missing,
        notes=(*found.notes, *_other_shapes(sets, raw)),
        others=contents.others(used, known=(*found.counters, "decay")),
        metadata=tuple(map(str, content.about)),
        reading=Reading(
            sum(row.num_numbers * len(row.leaves) for row in compared),
            sum(row.num_read * len(row.leaves) for row in compared),
        ),
        distances=distances(compared, found.averages, raw=raw),
        nonfinite=nonfinite(compared),
        verification=verification,
    )


class _Progress:
    def __init__(self, tell: Callable[[int, int], None], whole: int) -> None:
        self._tell = tell
        self._whole = whole
        self._done = 0

    def add(self, num_bytes: int) -> None:
        self._done = min(self._done + num_bytes, self._whole)
        self._tell(self._done, self._whole)


def _free_name(averages: Mapping[str, object]) -> str:
    """What the raw weights are called, where no average is called so."""
    name = _RAW
    while name in averages:
        name = f"{name} weights"
    return name


def _files(leaves: Iterable[Leaf], path: Path) -> list[Path]:
    """The files that tensors have bytes in; the file itself in any case."""
    found = [path] if path.is_file() else []
    found += [part.span.path for leaf in leaves for part in leaves_of(leaf)]
    return list(dict.fromkeys(found))


def _set(name: str, tensors: Mapping[str, Leaf], contents: Contents, path: Path, *, is_average: bool) -> WeightSet:
    by_leaf: dict[Leaf, list[str]] = {}
    for key, leaf in tensors.items():
        by_leaf.setdefault(leaf, []).append(key)
    folder = path if path.is_dir() else path.parent
    files = _files(tensors.values(), folder)
    return WeightSet(
        name=name,
        is_average=is_average,
        where=contents.where(tensors),
        files=tuple(os.path.relpath(file, folder) for file in files),
        num_tensors=len(tensors),
        num_distinct=len(by_leaf),
        num_numbers=sum(math.prod(leaf.shape) for leaf in by_leaf if is_looked_at(leaf)),
        num_bytes=sum(leaf.num_bytes for leaf in by_leaf),
        dtypes=dict(Counter(leaf.dtype for leaf in by_leaf)),
        # Tensors without numbers may seem to lie in the same place.
        ties=tuple(tuple(keys) for leaf, keys in by_leaf.items() if len(keys) > 1 and math.prod(leaf.shape)),
    )


def _other_shapes(sets: Mapping[str, Mapping[str, Leaf]], raw: str) -> list[Note]:
    given = sets.get(raw, {})
    differ = [
        name
        for key, tensors in sets.items()
        if key != raw
        for name, leaf in tensors.items()
        if name in given and given[name].shape != leaf.shape
    ]
    text = f"of another shape in the raw weights, and not compared: {listed(dict.fromkeys(differ))}"
    return [Note(text)] if differ else []


def _profiles(found: Found) -> tuple[ProfileAccount, ...]:
    """The profile of each average that the file describes."""
    time = found.counters.get("time", math.inf)
    now = float(time) if time < _MAX_TIME else math.inf
    return tuple(_profile(name, about, now) for name, about in found.profiles.items())


def _ages_of_decay(decay: float | None) -> tuple[float | None, float | None]:
    """Half-life and mean age, in updates, of an average that keeps so much of itself at each of them."""
    return (None, None) if decay is None or not 0 <= decay < 1 else _ages(Exponential(decay), math.inf)


def _profile(name: str, about: Mapping[str, Any], now: float) -> ProfileAccount:
    # The text of what is wrong with it would hold all of it, and that may be endless.
    if not all(value is None or isinstance(value, (bool, int, float, str)) for value in about.values()):
        return ProfileAccount(name, "not understood", None, None)
    try:
        profile = profile_from_description(about)
        return ProfileAccount(name, repr(profile), *_ages(profile, now))
    except (ValueError, TypeError, ArithmeticError) as error:
        return ProfileAccount(name, f"not understood: {error}", None, None)


def _ages(profile: Profile, now: float) -> tuple[float | None, float | None]:
    """Half-life and mean age, where there is a formula for them and not a sum over all steps."""
    if not isinstance(profile, (Exponential, Power, Uniform)) or not now > 0:
        return None, None
    ages = profile.half_life(now), profile.mean_age(now)
    half_life, mean_age = (age if math.isfinite(age) else None for age in ages)
    return half_life, mean_age
