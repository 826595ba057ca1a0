"""`polyak convert IN OUT --to LAYOUT`: an average that one library saved, as another one loads it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from .text import Format, Names, SkipObjects, as_options, inert, read_names

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_MAX_LINE = 400


def convert(
    input: Annotated[
        Path, typer.Argument(metavar="IN", help="A file or folder that any library wrote.", show_default=False)
    ],
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="A file, which is replaced if it is there; or a new folder.", show_default=False
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            metavar="LAYOUT",
            help="safetensors, plain, timm, torch, ema-pytorch, torch-ema or lightning: a file. huggingface, "
            "diffusers: a folder.",
            show_default=False,
        ),
    ],
    average: Annotated[str | None, typer.Option(metavar="NAME", help="Which one, where there are several.")] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="Of floating-point tensors: bfloat16, float32 and so on.")
    ] = None,
    decay: Annotated[
        float | None, typer.Option(help="Of the average, for layouts that keep it, where the input does not.")
    ] = None,
    names: Names = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The model's config.json, where the input folder has none."),
    ] = None,
    format: Format = None,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Of a file of a folder, in bytes, or as 500MB or 5GB.")
    ] = "5GB",
    skip_objects: SkipObjects = False,
) -> None:
    """Write an average that one library saved as another one loads it, and trains on from.

    What the layout needs and the input lacks is assumed, and what is printed says so.
    """
    # Only here: torch takes seconds, and the other commands do without.
    import torch

    from polyak.files.conversion import convert as convert_file

    chosen = getattr(torch, dtype.removeprefix("torch."), None) if dtype is not None else None
    if dtype is not None and not isinstance(chosen, torch.dtype):
        raise typer.BadParameter(f"{dtype!r} is no dtype; take bfloat16, float16 or float32", param_hint="--dtype")
    done = convert_file(
        input,
        output,
        to=to,
        average=average,
        dtype=chosen,
        decay=decay,
        names=read_names(names),
        format=format,
        config=config,
        max_shard_bytes=_num_bytes(max_shard_size),
        skip_objects=skip_objects,
    )
    for line in (*done.heads, *(f"  {as_options(note)}" for note in done.notes)):
        typer.echo(inert(line, limit=_MAX_LINE))


def _num_bytes(size: str) -> int:
    """Bytes of a size such as 5GB.

    Raises:
        typer.BadParameter: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", size.strip(), re.IGNORECASE)
    if found is None:
        raise typer.BadParameter(f"{size!r} is no size; write it as 5GB", param_hint="--max-shard-size")
    return int(float(found[1]) * _UNITS[found[2].upper()])
