"""From a path to what is in the file, in one step, with one kind of error for whatever is wrong with it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from polyak.errors import FileFormatError, MismatchError, PolyakError, listed
from polyak.files.containers import damaged, open_content

from .finding import Found, find_layout
from .table import formats


def examine(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    names: Sequence[Sequence[str]] = (),
    skip_objects: bool = False,
) -> Found:
    """Which layout a file is of and what it holds, without reading its tensors or running what is pickled in it.

    Args:
        path: a file or folder.
        format: the name of a layout, where it shall not be found out.
        names: lists of names of the model's parameters in order, of which one may fit.
        skip_objects: whether objects of unknown classes are passed over, without importing them, instead of refused.

    Raises:
        FileNotFoundError: there is nothing of that name.
        FileFormatError: it is damaged, hostile, of no known layout, or could be of two.
        MismatchError: the names are not as many as the tensors, or one is there twice.
    """
    if format is not None and format not in formats():
        raise FileFormatError(f"format={format!r} is unknown; there are {', '.join(formats())}")
    for given in names:
        twice = [name for name, count in Counter(given).items() if count > 1]
        if twice:
            raise MismatchError(f"names= has {listed(twice)} more than once")
    content = open_content(path, skip_objects=skip_objects)
    try:
        return find_layout(
            content,
            open_beside=lambda beside: open_content(beside, skip_objects=skip_objects),
            format=format,
            names=names,
        )
    except PolyakError as error:
        raise type(error)(f"{os.fspath(path)!r} {error}") from error.__cause__
    except OSError:
        raise
    # What a hostile file has in place of numbers, names and lists leads to any error.
    except Exception as error:
        raise damaged(path, error) from error
