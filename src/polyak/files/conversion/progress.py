"""How far an average is, whatever its library calls that: number of updates, decay, and warm-up of the decay."""

from __future__ import annotations

import math
from collections.abc import Mapping

from polyak.files.checkpoints import Checkpoint
from polyak.files.layouts import BY_NAME, Layout
from polyak.profiles import Exponential


def layout_of(checkpoint: Checkpoint) -> Layout:
    """The layout that a file was read by."""
    return BY_NAME[checkpoint.format]


def num_updates(checkpoint: Checkpoint) -> int | None:
    """How many updates the average has had, if the file tells."""
    count = checkpoint.counters.get(layout_of(checkpoint).updates or "")
    return int(count) if count is not None and math.isfinite(count) and count >= 0 else None


def num_copies(checkpoint: Checkpoint) -> int | None:
    """The number of updates for a library whose first update is a copy: 0 only if that was still to come here."""
    count = num_updates(checkpoint)
    return count if count is None or layout_of(checkpoint).begins_with_copy else max(count, 1)


def decay_of(checkpoint: Checkpoint, average: str) -> float | None:
    """What the average keeps of itself at an update, where that is known and stays the same."""
    profile = checkpoint.profiles.get(average)
    if checkpoint.decay is not None or not isinstance(profile, Exponential) or profile.debias:
        return checkpoint.decay
    time, count = checkpoint.counters.get("time"), num_updates(checkpoint)
    between = time / count if time and count else 1
    return profile.decay if between == 1 else math.exp(-profile.rate * between)


def diffusers_fields(checkpoint: Checkpoint) -> Mapping[str, int | float] | None:
    """What diffusers says of its average, if it wrote the file."""
    return checkpoint.counters if layout_of(checkpoint).updates == "optimization_step" else None


def warm_up(checkpoint: Checkpoint) -> int | None:
    """The s of the last update, if decays are min(decay, (1 + s) / (10 + s)); None if they are not."""
    layout, counters = layout_of(checkpoint), checkpoint.counters
    count = num_updates(checkpoint)
    if not layout.warms_up or count is None:
        return None
    if diffusers_fields(checkpoint) is None:
        return count
    # A least decay that is the decay itself leaves nothing of the warm-up.
    is_constant = checkpoint.decay is not None and counters.get("min_decay", 0) >= checkpoint.decay
    if counters.get("use_ema_warmup") or is_constant:
        return None
    return max(count - int(counters.get("update_after_step", 0)) - 1, 0)
