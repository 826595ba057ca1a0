"""Writes an average that one library saved as another one loads it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyak.errors import FileFormatError, MismatchError, PolyakError
from polyak.files.checkpoints import Checkpoint, read, save
from polyak.files.containers import CONFIGURATION, leaves_of, read_json, verify
from polyak.files.layouts import Note
from polyak.files.writing import write_safetensors, write_sharded
from polyak.kernels import check_floating_point
from polyak.profiles import Exponential

from .material import Maker, Material, complete, decay_of, first_names, num_updates, order_of
from .written import WRITTEN, Written

_FILES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".tar", ".pkl", ".json")
_ADAPTER = "adapter_config.json"
_LARGE = 5_000_000_000


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What `convert` did.

    Attributes:
        path: what was written.
        to: its layout.
        input: what was read.
        format: its layout.
        average: the name that the average has there.
        num_tensors: of the average, in what was written.
        num_bytes: of the average, in what was written.
        notes: what a user should know: what was assumed, filled in or lost.
    """

    path: Path
    to: str
    input: Path
    format: str
    average: str
    num_tensors: int
    num_bytes: int
    notes: tuple[Note, ...]

    @property
    def heads(self) -> tuple[str, str]:
        """What was read and what was written, in a line each."""
        size = f"{self.num_tensors} tensors, {self.num_bytes:,} bytes"
        return f"{self.input}: {self.format}, average {self.average!r}", f"{self.path}: {self.to}, {size}"

    def __str__(self) -> str:
        return "\n".join([*self.heads, *(f"  {note}" for note in self.notes)])


def convert(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    to: str,
    average: str | None = None,
    dtype: torch.dtype | None = None,
    decay: float | None = None,
    model: nn.Module | None = None,
    names: Sequence[str] | None = None,
    format: str | None = None,
    config: str | os.PathLike[str] | None = None,
    max_shard_bytes: int = _LARGE,
    skip_objects: bool = False,
) -> Conversion:
    """Writes an average that one library saved as another one loads it, and trains on from.

    What the layout needs and the input lacks is assumed, and the account that is returned says so: raw weights are the
    average; a number of updates is such that the average goes on. States of optimizers are not converted.

    Args:
        path: what `read` reads: a file or folder of any library.
        output: where to. A file that is there is replaced, whole or not at all; a folder must not exist or be empty.
        to: "safetensors", "plain" (tensors by name, of torch.save), "huggingface" (a folder), "timm", "torch"
            (AveragedModel), "ema-pytorch", "torch-ema", "diffusers" (a folder) or "lightning".
        average: which one, where there are several.
        dtype: of all floating-point tensors. Default: as they are. Integers are never cast.
        decay: of the average, for layouts that keep it. Default: the input's; 0.9999 if it has none.
        model: the model, or a trainer's module with the model in it. It names tensors that have positions only, and
            says which are parameters. "torch-ema" needs it, or `names`, unless the input is positional as well.
        names: of the parameters, in the order of `model.parameters()`.
        format: the layout of the input; detected if omitted.
        config: the model's config.json, or a folder with it. Default: the input folder's. "diffusers" needs it.
        max_shard_bytes: that a file of a folder has at most; above it there are several, and an index.
        skip_objects: whether a file is read that holds objects beside its tensors, without them. Nothing runs.

    Raises:
        FileNotFoundError: there is no such input.
        FileExistsError: the output is a folder that is not empty.
        FileFormatError: the input cannot be read, has no average, or several and none was chosen.
        MismatchError: names of parameters are needed, or do not fit.
        ValueError: an argument is not one of those above, or a number is too large for `dtype`.
        OSError: the output cannot be written; a file that was there is as it was.

    Example:
        >>> import tempfile, polyak
        >>> folder, model = tempfile.mkdtemp(), nn.Linear(2, 1)
        >>> averaged = torch.optim.swa_utils.AveragedModel(model)
        >>> averaged.update_parameters(model)
        >>> torch.save(averaged.state_dict(), f"{folder}/swa.pth")
        >>> done = polyak.convert(f"{folder}/swa.pth", f"{folder}/swa.safetensors", to="safetensors")
        >>> done.format, done.num_tensors, done.num_bytes
        ('torch', 2, 12)
    """
    layout = _check(path, output, to=to, dtype=dtype, decay=decay, max_shard_bytes=max_shard_bytes)
    configuration = _configuration(path, config) if layout.kind == "folder" else None
    checkpoint, prefix = _read(path, format=format, model=model, names=names, skip_objects=skip_objects)
    chosen = checkpoint.choose(average)
    _check_is_not_read(checkpoint, output)
    if not checkpoint.has_names and not layout.is_positional:
        raise MismatchError(
            f"the tensors in {os.fspath(path)!r} have no names, but positions", needs=("model", "names")
        )
    if to == "huggingface" and (Path(path) / _ADAPTER).is_file():
        raise FileFormatError(
            f"{os.fspath(path)!r} is an adapter, and its base is not in it; convert it to 'safetensors', and "
            f"{_ADAPTER} belongs beside them under the name adapter_model.safetensors"
        )
    if configuration is None and layout.name == "diffusers":
        raise FileFormatError(
            f"{os.fspath(path)!r} has no {CONFIGURATION}, without which diffusers cannot make the model",
            needs=("config",),
        )
    _verify(checkpoint)
    maker = Maker(path, dtype)
    given = checkpoint.averages[chosen]
    # Without a name in common they are of another model.
    raw = checkpoint.raw_weights
    raw = raw if raw is not None and (raw.keys() & given.keys() or not checkpoint.has_names) else None
    material = Material(
        checkpoint=checkpoint,
        chosen=chosen,
        average=maker.tensors(given, prefix),
        raw=None if raw is None else maker.tensors(raw, prefix),
        decay=decay,
        config=configuration,
        has_model=model is not None,
        notes=list(checkpoint.notes),
    )
    if layout.is_positional:
        material.order = order_of(material, given, prefix=prefix, names=names, model=model)
    else:
        complete(material, model, maker, with_raw="raw" in layout.keeps)
    content = layout.content(material)
    about = layout.about(material) if layout.about is not None else None
    _say_what_is_lost(material, layout, about)
    written = _tensors_of(material, layout, content)
    num_bytes = sum(tensor.nbytes for tensor in written)
    if layout.kind != "folder" and Path(output).exists():
        material.note("the file that was there is replaced")
    if layout.kind == "torch":
        save(content, output)
    elif layout.kind == "safetensors":
        if num_bytes > max_shard_bytes:
            material.note(f"one file of {num_bytes:,} bytes; the layout 'huggingface' has several, with an index")
        write_safetensors(output, content, metadata=about or {})
    else:
        beside = {} if about is None else {CONFIGURATION: (json.dumps(about, indent=2) + "\n").encode()}
        write_sharded(output, content, metadata={}, max_bytes=max_shard_bytes, stem=layout.stem, beside=beside)
    return Conversion(
        path=Path(output),
        to=to,
        input=Path(path),
        format=checkpoint.format,
        average=chosen,
        num_tensors=len(written),
        num_bytes=num_bytes,
        notes=tuple(dict.fromkeys(material.notes)),
    )


def _verify(checkpoint: Checkpoint) -> None:
    """Compares what will be read with the checksums in it, for what is written gets new ones."""
    sets = [*checkpoint.averages.values(), *filter(None, [checkpoint.raw_weights])]
    files = {part.span.path for tensors in sets for name in tensors for part in leaves_of(tensors.leaf(name))}
    problems = verify(sorted(files)).problems
    if problems:
        raise FileFormatError(f"{problems[0].file!r} is damaged: {problems[0]}; take another copy of it")


def _check(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    to: str,
    dtype: torch.dtype | None,
    decay: float | None,
    max_shard_bytes: int,
) -> Written:
    """The layout to write, when the arguments make sense together."""
    if to not in WRITTEN:
        raise PolyakError(f"{to!r} is unknown; there are {', '.join(WRITTEN)}", argument="to")
    if dtype is not None:
        check_floating_point(dtype)
    if decay is not None and not 0 <= decay <= 1:
        raise PolyakError(f"{decay!r} must be between 0 and 1", argument="decay")
    if max_shard_bytes <= 0:
        raise PolyakError(f"{max_shard_bytes} must be positive", argument="max_shard_bytes")
    layout, target = WRITTEN[to], Path(output)
    what = {"torch": "a file of torch.save", "safetensors": "a file of safetensors", "folder": "a folder"}[layout.kind]
    wrong = {
        "torch": target.suffix in (".safetensors", ".json"),
        "safetensors": target.suffix != ".safetensors",
        "folder": target.suffix in _FILES,
    }[layout.kind]
    if wrong:
        advice = "name it .safetensors" if layout.kind == "safetensors" else f"do not name it {target.suffix}"
        raise PolyakError(f"{to!r} writes {what}; {advice} ({os.fspath(output)!r})", argument="to")
    here, there = (Path(os.path.realpath(each)) for each in (path, output))
    if here == there or here in there.parents:
        raise ValueError(f"{os.fspath(output)!r} is the input or in it, and would be written while it is read")
    return layout


def _check_is_not_read(checkpoint: Checkpoint, output: str | os.PathLike[str]) -> None:
    """Raises where tensors come from the output itself, such as the raw weights that lie beside an average."""
    sets = [*checkpoint.averages.values(), *filter(None, [checkpoint.raw_weights])]
    files = {stored.span.path for tensors in sets for name in tensors for stored in leaves_of(tensors.leaf(name))}
    if os.path.realpath(output) in {os.path.realpath(file) for file in files}:
        raise ValueError(
            f"{os.fspath(output)!r} has weights that {str(checkpoint.path)!r} goes with; choose another name"
        )


def _read(
    path: str | os.PathLike[str],
    *,
    format: str | None,
    model: nn.Module | None,
    names: Sequence[str] | None,
    skip_objects: bool,
) -> tuple[Checkpoint, str]:
    """What is in the input, and where in the model that was given it belongs."""
    # With a model, names= can only say which parameters a positional layout shall have.
    inside = (
        [("", model)]
        if model is None
        else [("", model), *((f"{name}.", part) for name, part in model.named_children())]
    )
    refused: MismatchError | None = None
    for prefix, part in inside:
        try:
            return read(path, format, part, names, skip_objects=skip_objects), prefix
        except MismatchError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _configuration(path: str | os.PathLike[str], config: str | os.PathLike[str] | None) -> Mapping[str, Any] | None:
    """The model's configuration: that which was given, or the input's own."""
    given = Path(path if config is None else config)
    file = given / CONFIGURATION if given.is_dir() else given
    if config is None and (file == given or not file.is_file()):
        return None
    try:
        return read_json(file)
    except FileFormatError as error:
        raise FileFormatError(f"{str(file)!r} {error}, and the configuration of a model is needed") from error.__cause__


def _say_what_is_lost(material: Material, layout: Written, about: Mapping[str, Any] | None) -> None:
    checkpoint = material.checkpoint
    profile = checkpoint.profiles.get(material.chosen)
    known = decay_of(checkpoint, material.chosen)
    kept = layout.keeps
    if layout.kind == "safetensors" and about is not None:
        kept |= {"updates", "decay", "profile"}
    # A decay that stays the same is all that such a profile says.
    if isinstance(profile, Exponential) and known is not None:
        kept |= {"profile"}
    facts = (
        (num_updates(checkpoint), "updates", "number of updates ({})"),
        (known if material.decay is None else material.decay, "decay", "decay ({})"),
        (profile, "profile", "profile ({})"),
        (material.raw, "raw", "raw weights"),
    )
    lost = [text.format(value) for value, key, text in facts if value is not None and key not in kept]
    if lost:
        material.note(f"{layout.name} files cannot hold: {', '.join(lost)}")


def _tensors_of(material: Material, layout: Written, content: Mapping[str, Any]) -> list[Tensor]:
    """The tensors of the average that are written; tied ones once where they share memory."""
    if layout.is_positional:
        return content["shadow_params"]
    return list(content.values()) if layout.kind != "torch" else list(first_names(material.average).values())
