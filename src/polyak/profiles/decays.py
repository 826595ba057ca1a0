"""The decays that people give step by step, by name; each is the one of the library that it is known from.

Step 1 is the first update in all of them. Libraries count differently, and some copy the weights at first: such
differences are in the formulas here, so that every step gets the decay that the library gives it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

DecayFunction = Callable[..., float]
AnyFunction = TypeVar("AnyFunction", bound=DecayFunction)

_FUNCTIONS: dict[str, DecayFunction] = {}


def register_schedule(name: str) -> Callable[[AnyFunction], AnyFunction]:
    """Makes a function of one's own a schedule, by a name under which it can be saved and found again.

    The function takes the step, 1 at the first update, and keyword arguments; it returns the decay of that step, in
    [0, 1]. It must be registered again, by the same code, before what was saved with it is loaded.

    Args:
        name: name for `Schedule(name, ...)`, one that is not taken.

    Raises:
        ValueError: the name is taken by another function.

    Example:
        >>> from polyak.profiles import Schedule
        >>> @register_schedule("two-phases")
        ... def two_phases(step: int, *, switch_step: int) -> float:
        ...     return 0.99 if step <= switch_step else 0.999
        >>> Schedule("two-phases", switch_step=5000).decay(5001)
        0.999
    """

    def register(function: AnyFunction) -> AnyFunction:
        if _FUNCTIONS.setdefault(name, function) is not function:
            raise ValueError(f"schedule {name!r} is already another function, {_FUNCTIONS[name]!r}: choose a free name")
        return function

    return register


def decay_function(name: str) -> DecayFunction:
    """The function that is registered under a name; raises ValueError with the known names if there is none."""
    if name not in _FUNCTIONS:
        known = ", ".join(map(repr, sorted(_FUNCTIONS)))
        raise ValueError(f"no schedule is called {name!r}; register it with @register_schedule, or use one of {known}")
    return _FUNCTIONS[name]


@register_schedule("inverse-gamma")
def inverse_gamma(
    step: int,
    *,
    decay: float = 0.9999,
    min_decay: float = 0.0,
    update_after: int = 0,
    gamma: float = 1.0,
    power: float = 2 / 3,
) -> float:
    """Inverse-gamma warm-up: 1 - (1 + t / gamma) ** -power with t = step - update_after - 1, within bounds.

    Up to step update_after + 1 the weights are copied. With `power` 1 it is a uniform average until `decay` is
    reached. timm's `ModelEmaV3(use_warmup=True)`, ema-pytorch's `EMA` and diffusers' `EMAModel(use_ema_warmup=True)`
    do this; k-diffusion's `EMAWarmup`, where it comes from, does it with `power` 1 and `decay` 1 by default.

    Source: Crowson, k-diffusion, `EMAWarmup`; Wightman, timm, `ModelEmaV3.get_decay`.
    """
    passed = step - update_after - 1
    if passed <= 0:
        return 0.0
    return max(min_decay, min(decay, 1 - (1 + passed / gamma) ** -power))


@register_schedule("tensorflow")
def tensorflow(step: int, *, decay: float = 0.999) -> float:
    """TensorFlow's warm-up: min(decay, (1 + step) / (10 + step)); also torch-ema's and Stable Diffusion's `LitEma`.

    Before `decay` is reached, after about 9 / (1 - decay) steps, it is not an exponential average at all but nearly
    `Power(exponent=8)`.

    Source: TensorFlow, `tf.train.ExponentialMovingAverage` with num_updates = step.
    """
    return min(decay, (1 + step) / (10 + step))


@register_schedule("diffusers")
def diffusers(step: int, *, decay: float = 0.9999, min_decay: float = 0.0, update_after: int = 0) -> float:
    """TensorFlow's warm-up as diffusers counts it: (1 + t) / (10 + t) with t = step - update_after - 1, within bounds.

    Up to step update_after + 1 the weights are copied.

    Source: Diffusers, `EMAModel.get_decay` with use_ema_warmup=False.
    """
    passed = step - update_after - 1
    if passed <= 0:
        return 0.0
    return max(min_decay, min(decay, (1 + passed) / (10 + passed)))


@register_schedule("ultralytics")
def ultralytics(step: int, *, decay: float = 0.9999, tau: float = 2000) -> float:
    """Ultralytics' ramp: decay * (1 - exp(-step / tau)).

    Source: Ultralytics, `ModelEMA`.
    """
    return -decay * math.expm1(-step / tau)


@register_schedule("cosine")
def cosine(step: int, *, base: float = 0.996, num_steps: int) -> float:
    """Cosine momentum of target networks: from `base` at step 1 to 1 at step num_steps + 1, and 1 ever after.

    decay = 1 - (1 - base) * (1 + cos(pi * t / num_steps)) / 2 with t = step - 1, as BYOL and DINO count.

    Source: Grill et al., Bootstrap your own latent: a new approach to self-supervised learning, 2020; Caron et al.,
    Emerging properties in self-supervised vision transformers, 2021.
    """
    passed = min(step - 1, num_steps)
    return 1 - (1 - base) * math.cos(math.pi * passed / (2 * num_steps)) ** 2


@register_schedule("linear")
def linear(step: int, *, first_decay: float, last_decay: float, num_steps: int) -> float:
    """Linear ramp from `first_decay` at step 1 to `last_decay` at step num_steps, and `last_decay` ever after.

    Source: PyTorch-Ignite, `EMAHandler`, whose momenta are 1 - decay.
    """
    passed = min((step - 1) / max(1, num_steps - 1), 1)
    return first_decay + (last_decay - first_decay) * passed


@register_schedule("polynomial")
def polynomial(step: int, *, eta: float = 3.0) -> float:
    """Polynomial-decay averaging: 1 - (eta + 1) / (step + eta); uniform for eta 0.

    In the long run it is `Power(exponent=eta)`.

    Source: Shamir and Zhang, Stochastic gradient descent for non-smooth optimization: convergence results and optimal
    averaging schemes, 2013.
    """
    return (step - 1) / (step + eta)


@register_schedule("mmengine")
def mmengine(step: int, *, decay: float = 0.9998, gamma: float = 100) -> float:
    """MMEngine's annealed momentum: min(decay, t / (gamma + t)) with t = step - 1: the first update copies.

    Source: MMEngine, `MomentumAnnealingEMA`, whose momentum is 1 - decay.
    """
    return min(decay, (step - 1) / (gamma + step - 1))


@register_schedule("half-life-ramp")
def half_life_ramp(step: int, *, half_life: float, ratio: float = 0.09) -> float:
    """Half-life that grows with the run up to a limit: 2 ** (-1 / min(half_life, ratio * step)), all in steps.

    Source: Karras et al., Analyzing and improving the training dynamics of diffusion models, 2024: the traditional EMA
    that they compare with, at a constant batch size.
    """
    return 2 ** (-1 / min(half_life, ratio * step))
