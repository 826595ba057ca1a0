"""The numbers of `encoding`, of the modes and of floats as the kernels in Triton take them."""

from __future__ import annotations

import torch
import triton.language as tl

from polyak.kernels.modes import MODES, compensated, plain, stochastic
from polyak.kernels.rounding import GOLDEN

from . import encoding

SOURCE_COLUMN = tl.constexpr(encoding.SOURCE_COLUMN)
KEY_COLUMN = tl.constexpr(encoding.KEY_COLUMN)
FIRST_COLUMN = tl.constexpr(encoding.FIRST_COLUMN)
AVERAGE_COLUMNS = tl.constexpr(encoding.AVERAGE_COLUMNS)

START, PACKED = tl.constexpr(encoding.START), tl.constexpr(encoding.PACKED)
CHUNK_COLUMNS, COPY_COLUMNS = tl.constexpr(encoding.CHUNK_COLUMNS), tl.constexpr(encoding.COPY_COLUMNS)
COUNT_SHIFT, KIND_SHIFT = tl.constexpr(encoding.COUNT_SHIFT), tl.constexpr(encoding.KIND_SHIFT)
ROW_MASK, COUNT_MASK = tl.constexpr(encoding.ROW_MASK), tl.constexpr(encoding.COUNT_MASK)

FLOAT32 = tl.constexpr(encoding.FORMATS.index(torch.float32))
BFLOAT16 = tl.constexpr(encoding.FORMATS.index(torch.bfloat16))
PLAIN = tl.constexpr(MODES.index(plain))
COMPENSATED = tl.constexpr(MODES.index(compensated))
STOCHASTIC = tl.constexpr(MODES.index(stochastic))
AVERAGE_UNIT = tl.constexpr(encoding.AVERAGE_UNIT)

LEAVES, COPIES = tl.constexpr(encoding.LEAVES), tl.constexpr(encoding.COPIES)

MADE, SKIPPED, VERDICT = tl.constexpr(encoding.MADE), tl.constexpr(encoding.SKIPPED), tl.constexpr(encoding.VERDICT)
STEP_KEY, MIXED_SEED = tl.constexpr(encoding.STEP_KEY), tl.constexpr(encoding.MIXED_SEED)

# The mixing of random bits; see `rounding`.
STRIDE = tl.constexpr(GOLDEN)
SIGNED_STRIDE = tl.constexpr(encoding.signed(GOLDEN))
FIRST_FACTOR, LAST_FACTOR = tl.constexpr(0x85EBCA6B), tl.constexpr(0xC2B2AE35)

# The bits of the exponents of each format.
FLOAT32_EXPONENT = tl.constexpr(0x7F800000)
BFLOAT16_EXPONENT = tl.constexpr(0x7F80)
FLOAT16_EXPONENT = tl.constexpr(0x7C00)
