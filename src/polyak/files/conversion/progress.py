"""How far an average is, whatever its library calls that: number of updates, decay, and warm-up of the decay."""

from __future__ import annotations

import math
from collections.abc import Mapping

from polyak.files.checkpoints import Checkpoint
from polyak.files.layouts import LAYOUTS
from polyak.profiles import Exponential

# Names of the number of updates. The `step` of most files is that of the optimizer.
_UPDATES = ("num_updates", "n_averaged", "optimization_step", "current_step", "steps")
_POSITIONAL = frozenset(layout.name for layout in LAYOUTS if layout.is_positional)
_WARM_UPS = frozenset({"torch-ema", "litema"})
_DIFFUSERS = frozenset({"diffusers", "diffusers-state", "simpletuner"})
# With these the first update makes the average a copy of the weights, whatever it was before.
_BEGIN_WITH_COPY = _DIFFUSERS | {
    "torch",
    "lightning",
    "lightning-swa",
    "composer-swa",
    "mmengine",
    "mmengine-module",
    "ema-pytorch",
}


def is_positional(checkpoint: Checkpoint) -> bool:
    """Whether the layout of the file has its tensors in the order of a model's parameters."""
    return checkpoint.format in _POSITIONAL


def num_updates(checkpoint: Checkpoint) -> int | None:
    """How many updates the average has had, where the file tells."""
    names = ("step",) if checkpoint.format.startswith("ema-pytorch") else _UPDATES
    for name in names:
        count = checkpoint.counters.get(name)
        if count is not None and math.isfinite(count) and count >= 0:
            return int(count)
    return None


def num_copies(checkpoint: Checkpoint) -> int | None:
    """The number of updates for a library whose first update is a copy: 0 only if that was still to come here."""
    count = num_updates(checkpoint)
    return count if count is None or checkpoint.format in _BEGIN_WITH_COPY else max(count, 1)


def decay_of(checkpoint: Checkpoint, average: str) -> float | None:
    """What the average keeps of itself at an update, where that is known and stays the same."""
    profile = checkpoint.profiles.get(average)
    if checkpoint.decay is not None or not isinstance(profile, Exponential) or profile.debias:
        return checkpoint.decay
    time, count = checkpoint.counters.get("time"), num_updates(checkpoint)
    between = time / count if time and count else 1
    return profile.decay if between == 1 else math.exp(-profile.rate * between)


def diffusers_fields(checkpoint: Checkpoint) -> Mapping[str, int | float] | None:
    """What diffusers says of its average, where it wrote the file."""
    return checkpoint.counters if checkpoint.format in _DIFFUSERS else None


def warm_up(checkpoint: Checkpoint) -> int | None:
    """The s of the last update, where decays are min(decay, (1 + s) / (10 + s)); None where they are not."""
    counters = checkpoint.counters
    if checkpoint.format in _WARM_UPS:
        count = counters.get("num_updates", -1)
        return int(count) if count >= 0 else None
    if checkpoint.format not in _DIFFUSERS or counters.get("use_ema_warmup") or "optimization_step" not in counters:
        return None
    # A least decay that is the decay itself leaves nothing of the warm-up.
    if checkpoint.decay is not None and counters.get("min_decay", 0) >= checkpoint.decay:
        return None
    return max(int(counters["optimization_step"]) - int(counters.get("update_after_step", 0)) - 1, 0)
