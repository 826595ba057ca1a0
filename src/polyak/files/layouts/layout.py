"""What a layout is: a row of the table that says where a library keeps its averages; and what is found by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from polyak.errors import with_advice
from polyak.files.containers import Content, Leaf

ANY_FILE = frozenset({"torch", "safetensors", "distributed"})
FOLDER = frozenset({"folder"})
DISTRIBUTED = frozenset({"distributed"})
# Where people keep the raw weights, beside an average.
WEIGHTS = ("model/*", "state_dict/*", "model_state_dict/*", "net/*", "network/*", "params/*", "unet/*")
STEPS = ("epoch", "step", "iteration", "global_step")


class Note(str):
    """What a user should know, as the library says it.

    Attributes:
        text: without what to do.
        under: the key of the file that it is about; None if it is about all of the file.
        needs: arguments that would help, as of a `PolyakError`.
    """

    text: str
    under: str | None
    needs: tuple[str, ...]

    def __new__(cls, text: str, *, under: str | None = None, needs: tuple[str, ...] = ()) -> Note:
        """A note in the words of the library."""
        note = super().__new__(cls, with_advice(text, needs))
        note.text, note.under, note.needs = text, under, needs
        return note


@dataclass(frozen=True, slots=True)
class Place:
    """What is being read: the file, the keys under which the layout begins, and names that the caller gave.

    Attributes:
        content: the file.
        under: keys of the dictionaries in which the layout stands; none for most.
        names: lists of names of the model's parameters in order, of which one may fit; none if no model is given.
    """

    content: Content
    under: tuple[str, ...] = ()
    names: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What is in a file; its tensors are not read yet.

    Attributes:
        content: the file.
        layout: the layout of the file.
        averages: tensors by the name of the average and their own.
        raw: the raw weights by name; none if the file has none.
        counters: numbers that say how far the training was.
        decay: of the average, if the file has it.
        profiles: descriptions of the profiles by the name of the average, likewise.
        has_names: whether the averages go by names; if not, by positions.
        missing: names that an average lacks: the raw weights have them, or the file has no plain tensor for them.
        notes: what else a user should know.
    """

    content: Content
    layout: Layout
    averages: Mapping[str, Mapping[str, Leaf]] = field(default_factory=dict[str, dict[str, Leaf]])
    raw: Mapping[str, Leaf] = field(default_factory=dict[str, Leaf])
    counters: Mapping[str, int | float] = field(default_factory=dict[str, "int | float"])
    decay: float | None = None
    profiles: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    has_names: bool = True
    missing: tuple[str, ...] = ()
    notes: tuple[Note, ...] = ()

    def noted(self, text: str, *, under: str | None = None, needs: tuple[str, ...] = ()) -> Found:
        """The same with one more note."""
        return replace(self, notes=tuple(dict.fromkeys([*self.notes, Note(text, under=under, needs=needs)])))


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where a library keeps its averages, in the words of `pattern`.

    Attributes:
        name: what `format=` takes.
        writer: the library and what of it writes such files.
        written: what `convert(to=)` takes for such files; what writes them is in `conversion`.
        average: where the average is; of several places, the later ones give what the earlier ones lack. Empty:
            there is none in such files, or `code` finds it.
        raw: where the raw weights are, likewise.
        keeps_old_raw: whether `raw` is what they were when the average last stood in the model. Then those beside it
            are meant, unless the average stands in them.
        counters: where numbers are that say how far the training was. Each goes by the last part of its place.
        updates: the counter that counts updates of the average. Most files have a `step` of the optimizer only.
        decay: where the decay is.
        begins_with_copy: whether the first update makes the average a copy of the weights, whatever it was before.
        warms_up: whether the decay begins as (1 + n) / (10 + n) after n updates.
        marks: what else must be there for a file to be of this layout.
        kinds: of files.
        file: a regular expression that the file's name must match. Its groups are counters by name, but for `average`
            (the name of the average), `decay`, and `stem`.
        about: keys that the metadata or configuration beside the tensors must have.
        beside: the name of a neighbour that has the raw weights, with the groups of `file` in it.
        is_positional: whether the tensors are without names, in the order of the model's parameters.
        may_stand_in: whether people keep it under a key of a dictionary of their own.
        is_fallback: whether it is tried only if no other layout fits.
        only_tensors: whether there may be nothing else than tensors and numbers.
        test: what else must hold for a file to be of this layout.
        code: does what a row cannot say, after all else was found.
        remark: what a user should know of such files.
    """

    name: str
    writer: str
    written: tuple[str, ...] = ()
    average: tuple[str, ...] = ()
    raw: tuple[str, ...] = ()
    keeps_old_raw: bool = False
    counters: tuple[str, ...] = ()
    updates: str | None = None
    decay: str | None = None
    begins_with_copy: bool = False
    warms_up: bool = False
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
    code: Callable[[Found, Place], Found] | None = None
    remark: str = ""
