"""What a layout is: a row of the table that says where a library keeps its averages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from polyak.files.containers import Content, Leaf

ANY_FILE = frozenset({"torch", "safetensors", "distributed"})
FOLDER = frozenset({"folder"})
DISTRIBUTED = frozenset({"distributed"})
# Where people keep the weights that are trained, beside an average.
WEIGHTS = ("model/*", "state_dict/*", "model_state_dict/*", "net/*", "network/*", "params/*", "unet/*")
STEPS = ("epoch", "step", "iteration", "global_step")


@dataclass(slots=True)
class Parts:
    """What was found in a file: tensors by average and name, and what is known about them."""

    averages: dict[str, dict[str, Leaf]] = field(default_factory=dict[str, dict[str, Leaf]])
    raw: dict[str, Leaf] = field(default_factory=dict[str, Leaf])
    counters: dict[str, int | float] = field(default_factory=dict[str, "int | float"])
    decay: float | None = None
    profiles: dict[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    has_names: bool = True
    missing: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])


@dataclass(frozen=True, slots=True)
class Place:
    """What is being read: the file, the keys under which the layout begins, and names that the caller gave.

    Attributes:
        content: the file.
        under: keys of the dictionaries in which the layout stands; none for most.
        names: lists of names of the model's parameters in order, of which one may fit; none where no model is given.
    """

    content: Content
    under: tuple[str, ...] = ()
    names: tuple[tuple[str, ...], ...] = ()


Code = Callable[[Parts, Place], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where a library keeps its averages, in the words of `pattern`.

    Attributes:
        name: what `format=` takes.
        writer: the library and what of it writes such files.
        average: where the average is; of several places, the later ones give what the earlier ones lack. Empty:
            there is none in such files, or `code` finds it.
        raw: where the weights that are trained are, likewise.
        keeps_old_raw: whether `raw` is what they were when the average last stood in the model. Then those beside it
            are meant, unless the average stands in them.
        counters: where numbers are that say how far the training was. Each goes by the last part of its place.
        decay: where the decay is.
        marks: what else must be there for a file to be of this layout.
        kinds: of files.
        file: a regular expression that the file's name must match. Its groups are counters by name, but for `average`
            (the name of the average), `decay`, and `stem`.
        about: keys that the metadata or configuration beside the tensors must have.
        beside: the name of a neighbour that has the raw weights, with the groups of `file` in it.
        is_positional: whether the tensors are without names, in the order of the model's parameters.
        may_stand_in: whether people keep it under a key of a dictionary of their own.
        is_fallback: whether it is thought of only when nothing else is found.
        only_tensors: whether there may be nothing else than tensors and numbers.
        test: what else must hold for a file to be of this layout.
        code: does what a row cannot say, after all else was found.
        remark: what a user should know of such files.
    """

    name: str
    writer: str
    average: tuple[str, ...] = ()
    raw: tuple[str, ...] = ()
    keeps_old_raw: bool = False
    counters: tuple[str, ...] = ()
    decay: str | None = None
    marks: tuple[str, ...] = ()
    kinds: frozenset[str] = ANY_FILE
    file: str | None = None
    about: tuple[str, ...] = ()
    beside: str | None = None
    is_positional: bool = False
    may_stand_in: bool = False
    is_fallback: bool = False
    only_tensors: bool = False
    test: Callable[[Content, tuple[str, ...]], bool] | None = None
    code: Code | None = None
    remark: str = ""
