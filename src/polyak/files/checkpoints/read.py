"""Reads what others saved without running anything that they saved."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from polyak.errors import FileFormatError, MismatchError, listed
from polyak.files.containers import Content, Leaf, Record, damaged, open_content
from polyak.files.layouts import Found, Note, examine
from polyak.model import Site, gather, unwrap, walk
from polyak.names import parts_around, renaming

from .checkpoint import Checkpoint, Pages

Shape = tuple[int, ...]


def read(
    path: str | os.PathLike[str],
    format: str | None = None,
    model: nn.Module | None = None,
    names: Sequence[str] | None = None,
    *,
    skip_objects: bool = False,
    run_pickled_code: bool = False,
) -> Checkpoint:
    """Reads the averages of a checkpoint, whichever library wrote it.

    Tensors are mapped from the file and read when they are used; nothing that is pickled in the file is run.

    Args:
        path: a file of torch.save or safetensors, or a folder of Hugging Face's form or torch.distributed.checkpoint.
        format: the layout; detected if omitted. `polyak.formats()` lists them.
        model: the model. Its parameters' order names the tensors of layouts without names; the averages go by its own
            names, tied ones by each, and are checked against its shapes.
        names: of the parameters that were averaged, in order, where there is no model at hand.
        skip_objects: whether a file is read that holds objects beside its tensors, without them. Nothing runs.
        run_pickled_code: whether what is pickled in the file may run, as `torch.load(weights_only=False)` does. It can
            do whatever you can: say so only of files that you would also execute.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: the file is damaged or hostile; holds objects whose loading could run code; is of no known
            layout; or could be of two.
        MismatchError: the model or the names do not fit what is in it.

    Example:
        >>> import tempfile, torch
        >>> model = nn.Linear(2, 1)
        >>> path = f"{tempfile.mkdtemp()}/checkpoint.pth"
        >>> weights = model.state_dict()
        >>> torch.save({"state_dict": weights, "state_dict_ema": weights, "epoch": 3}, path)
        >>> checkpoint = read(path)
        >>> checkpoint.format, sorted(checkpoint.average), checkpoint.counters
        ('timm', ['bias', 'weight'], {'epoch': 3})
        >>> model.load_state_dict(checkpoint.average)
        <All keys matched successfully>
    """
    if model is not None and names is not None:
        raise ValueError("names= and model= are both given; one of them says what the parameters are called")
    if names is not None and (isinstance(names, str) or {type(name) for name in names} - {str}):
        raise TypeError("names: a list of names of parameters is needed")
    with _plain_copy(path, allowed=run_pickled_code) as target:
        orders = _orders(model) if model is not None else [list(names)] if names is not None else []
        found = examine(target, format=format, names=orders, skip_objects=skip_objects)
        found = replace(found, content=replace(found.content, path=Path(path)))
        if model is not None:
            found = _fit(found, model)
        pages = Pages()
        if target != Path(path):
            pages.hold(target)
    checkpoint = Checkpoint(found, pages)
    # A description that is no profile is an error of the file, and not of whoever looks at the profile.
    _ = checkpoint.profiles
    return checkpoint


@contextmanager
def _plain_copy(path: str | os.PathLike[str], *, allowed: bool) -> Generator[Path, None, None]:
    """The file itself; or, where its code may run, a plain copy of what loading it gave, without objects.

    Modules are their `state_dict`s in the copy, and what is neither tensor nor plain value is left out.
    """
    if not allowed or not Path(path).is_file():
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="polyak-") as folder:
        try:
            content: object = torch.load(path, map_location="cpu", weights_only=False)
        except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise damaged(path, error) from error
        copy = Path(folder) / Path(path).name
        torch.save(_plain(content), copy)
        del content
        yield copy


def _plain(value: object) -> Any:
    if isinstance(value, nn.Module):
        return {name: part for name, part in value.state_dict().items() if isinstance(part, Tensor)}
    if isinstance(value, dict):
        items = cast("dict[object, object]", value).items()
        return {key: _plain(part) for key, part in items if isinstance(key, (str, int))}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in cast("list[object]", value)]
    if type(value) is Tensor or type(value) is nn.Parameter:
        return value.detach()
    return value if isinstance(value, (bool, int, float, str)) else None


def read_dictionary(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a dictionary that `torch.save` wrote: tensors and plain values, on the CPU, no other object.

    A record of plain values, such as the `argparse.Namespace` that timm puts beside the weights, is read as their
    dictionary.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: the file is damaged, holds something else than a dictionary, or objects whose loading could
            run code; none has run.
    """
    content = open_content(path)
    if content.kind not in ("torch", "safetensors"):
        raise FileFormatError(f"{os.fspath(path)!r} is a folder, and a file of torch.save is needed")
    return _made(content, Pages())


def _made(content: Content, pages: Pages) -> dict[str, Any]:
    """The tree with tensors in it. What stands in several places of the file is one object here, too."""
    made: dict[int, Any] = {}

    def make(value: Any) -> Any:
        if isinstance(value, Leaf):
            return pages.tensor(value)
        if isinstance(value, Record):
            return make(value.state)
        known = id(cast("object", value))
        if known in made:
            return made[known]
        if isinstance(value, tuple):
            made[known] = tuple(make(part) for part in cast("tuple[Any, ...]", value))
        elif isinstance(value, list):
            whole: list[Any] = []
            made[known] = whole
            whole.extend(make(part) for part in cast("list[Any]", value))
        elif isinstance(value, dict):
            tree: dict[Any, Any] = {}
            made[known] = tree
            tree.update((key, make(part)) for key, part in cast("dict[Any, Any]", value).items())
        else:
            return value
        return made[known]

    try:
        return make(content.tree)
    except RecursionError as error:
        raise FileFormatError(f"{str(content.path)!r} has dictionaries within dictionaries without end") from error


def _groups(model: nn.Module) -> list[list[Site]]:
    """The tensors of the bare model with all places that hold each. A model on the meta device has names enough."""
    sites = list(walk(unwrap(model)))
    if not any(site.tensor.is_meta for site in sites):
        return gather(unwrap(model))
    found: dict[int, list[Site]] = {}
    for site in sites:
        found.setdefault(id(site.tensor), []).append(site)
    return list(found.values())


def _orders(model: nn.Module) -> list[list[str]]:
    """The names of a model's parameters, and of those that are trained, in the order of `parameters()`."""
    groups = [sites for sites in _groups(model) if sites[0].is_parameter]
    trained = [sites[0].name for sites in groups if sites[0].tensor.requires_grad]
    return [[sites[0].name for sites in groups], trained]


def _fit(found: Found, model: nn.Module) -> Found:
    """The same under the model's own names, tied ones under each, after names and shapes were compared."""
    groups = _groups(model)
    shapes = {site.name: tuple(site.tensor.shape) for sites in groups for site in sites if site.persistent}
    ties = [[site.name for site in sites if site.persistent] for sites in groups]

    parameters = [[site.name for site in sites] for sites in groups if sites[0].is_parameter]
    notes: list[Note] = []

    def fit(given: Mapping[str, Leaf], what: str) -> dict[str, Leaf]:
        rename = renaming(given, shapes)
        named = {rename(name): leaf for name, leaf in given.items()}
        if given and not named.keys() & shapes.keys():
            part = _part(given, shapes, parameters, f"{what} in {str(found.content.path)!r}")
            if part is not None:
                named = _inside(given, part)
                notes.append(Note(f"of the part {part[:-1]!r}, which has the model's names and shapes"))
        unknown = [name for name in named if name not in shapes]
        if unknown:
            raise MismatchError(
                f"{what} in {str(found.content.path)!r} has {listed(unknown)}, and the model has "
                f"{listed(name for name in shapes if name not in named) or 'no other names'}. Give the model that it "
                "was made of"
            )
        for name, leaf in named.items():
            if tuple(leaf.shape) != shapes[name]:
                raise MismatchError(
                    f"{name!r} of {what} in {str(found.content.path)!r} is {tuple(leaf.shape)}, and {shapes[name]} in "
                    "the model"
                )
        for tied in ties:
            first = next((named[name] for name in tied if name in named), None)
            if first is not None:
                named |= {name: first for name in tied if name not in named}
        return {name: named[name] for name in shapes if name in named}

    averages = {name: fit(average, f"average {name!r}") for name, average in found.averages.items()}
    raw = fit(found.raw, "what was trained")
    lacking = [name for name in shapes if any(name not in average for average in averages.values())]
    notes = list(dict.fromkeys([*found.notes, *notes]))
    return replace(found, averages=averages, raw=raw, missing=tuple(lacking), notes=tuple(notes))


def _inside(given: Mapping[str, Leaf], part: str) -> dict[str, Leaf]:
    return {name.removeprefix(part): leaf for name, leaf in given.items() if name.startswith(part)}


def _part(
    given: Mapping[str, Leaf], shapes: Mapping[str, Shape], parameters: Sequence[Sequence[str]], what: str
) -> str | None:
    """The only part of a larger model that has all parameters of the model, with its names and shapes.

    Raises:
        MismatchError: several parts have.
    """
    # One that has all parameters has the first one, under one of its names.
    known = parameters[0] if parameters else shapes
    fitting: list[str] = []
    for part in sorted({part for name in known for part in parts_around(name, given)}):
        inside = _inside(given, part)
        right = all(shapes.get(name) == tuple(leaf.shape) for name, leaf in inside.items())
        if right and all(any(name in inside for name in tied) for tied in parameters):
            fitting.append(part)
    if len(fitting) > 1:
        raise MismatchError(
            f"{what} has the model's names and shapes in several parts, {listed(part[:-1] for part in fitting)}: read "
            "it without model=, and choose"
        )
    return fitting[0] if fitting else None
