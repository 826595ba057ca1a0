"""Reads what others saved without running anything that they saved."""

from __future__ import annotations

import argparse
import os
import pickle
import re
from typing import Any, cast

import torch

from polyak.errors import FileFormatError


def read_dictionary(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a dictionary that `torch.save` wrote: tensors and plain containers, on the CPU, no other object.

    An `argparse.Namespace`, which timm puts beside the weights, is read as what it is: names and plain values.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: the file is damaged, holds something else than a dictionary, or objects whose loading would
            run code; none has run.
    """
    # torch.load raises whatever a damaged byte leads it to.
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content: object = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        raise FileFormatError(
            f"{os.fspath(path)!r} is damaged, or holds objects whose loading could run code, and is not read"
            f"{_which(error)}"
        ) from error
    except Exception as error:
        raise FileFormatError(f"{os.fspath(path)!r} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise FileFormatError(f"{os.fspath(path)!r} holds a {type(content).__name__}, not a dictionary")
    return cast("dict[str, Any]", content)


def _which(error: pickle.UnpicklingError) -> str:
    """The object that was refused, where torch names it; its advice to load it all the same is left out."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f": {found[1]}" if found else ""
