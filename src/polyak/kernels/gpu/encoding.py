"""The numbers by which the table, the kernels and the control understand one another.

A row of the table has 64-bit columns: the address of the source, the key of its tensor, the number of the first
element, and then for each profile the address of its average, and for each what is kept beside that (0 for nothing).

A chunk has two: where it starts in its row, in elements; and the number of the row, the number of elements and the
kind, 32, 16 and 16 bits from the lowest on.

A kind is a number whose digits say what code a chunk needs: from the lowest on, whether vectors can read it, the format
of the source, that of the averages, and the mode.
"""

from __future__ import annotations

import torch

from polyak.kernels.modes import MODES, Mode

SOURCE_COLUMN, KEY_COLUMN, FIRST_COLUMN, AVERAGE_COLUMNS = range(4)

START, PACKED, CHUNK_COLUMNS = range(3)
COUNT_SHIFT, KIND_SHIFT = 32, 48
ROW_MASK, COUNT_MASK = (1 << 32) - 1, (1 << 16) - 1

FORMATS = (torch.float32, torch.bfloat16, torch.float16)
# Elements of one access of a thread: 16 bytes of float32, 8 of the others. A wider one for 16 bits would have to be
# shuffled between threads wherever it meets float32.
VECTOR_SIZE = 4
# What a digit of a kind is worth; that of the vectors is worth 1.
SOURCE_UNIT = 2
AVERAGE_UNIT = SOURCE_UNIT * len(FORMATS)
MODE_UNIT = AVERAGE_UNIT * len(FORMATS)

# A memory copy has four: from where, to where, how many numbers, of how many bytes.
COPY_COLUMNS = 4

# What the kernels take for weights of 0 and 1: one that only rounds to these in float32 is another thing.
LEAVES, COPIES = -1.0, 2.0

# What the control counts: updates made, updates left out, the key of the update to come, the mixed seed, and the last
# verdict: 1 if the update was made.
MADE, SKIPPED, STEP_KEY, MIXED_SEED, VERDICT = range(5)


def kind_of(mode: Mode, *, source: torch.dtype, average: torch.dtype, is_vector: bool) -> int:
    """The kind of a chunk.

    Example:
        >>> kind_of(MODES[1], source=torch.float16, average=torch.float32, is_vector=True)
        23
    """
    formats = FORMATS.index(source) * SOURCE_UNIT + FORMATS.index(average) * AVERAGE_UNIT
    return MODES.index(mode) * MODE_UNIT + formats + is_vector


def digits(kind: int) -> tuple[int, int, int, int, int]:
    """A kind as the kernels take it: its number, the elements of a vector, source, average and mode.

    Example:
        >>> digits(23)
        (23, 4, 2, 0, 1)
    """
    formats = len(FORMATS)
    vector = VECTOR_SIZE if kind % SOURCE_UNIT else 1
    return kind, vector, kind // SOURCE_UNIT % formats, kind // AVERAGE_UNIT % formats, kind // MODE_UNIT


def signed(bits: int) -> int:
    """64 bits as a signed number.

    Example:
        >>> signed(2**64 - 1)
        -1
    """
    return bits - (bits >> 63 << 64)
