"""Files that cannot be read without running what is pickled in them, once a user has said that it may run."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from polyak.files.containers import damaged


@contextmanager
def plain_copy(path: str | os.PathLike[str], *, allowed: bool) -> Generator[Path, None, None]:
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
