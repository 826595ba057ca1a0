"""How far averages are from averages in float64 that were made in the same run."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial, wraps
from multiprocessing import get_context

import torch
from torch import Tensor, nn

import polyak
from benchmarks.followers import COMPENSATED, FOLLOWERS, PLAIN, Follower, FollowerRow, flat

DECAYS = (0.999, 0.9999, 0.99999)
STEPS = 40_000
NOISY_DECAY = 0.999999
NOISY_TIMES_LONGER = 10
NOISY_ELEMENTS = 4096


@dataclass(frozen=True)
class Error:
    """Of one average: the relative L2 error, and its mean signed error in standard errors of that mean."""

    name: str
    decay: float
    relative: float
    standard_errors: float


@dataclass(frozen=True)
class ErrorRun:
    title: str
    steps: int
    errors: list[Error]
    left_out: list[str] = field(default_factory=list[str])  # because their packages are missing

    def of(self, name: str, decay: float) -> Error | None:
        return next((error for error in self.errors if (error.name, error.decay) == (name, decay)), None)


def compare(name: str, decay: float, average: Tensor, exact: Tensor) -> Error:
    differences = average.double() - exact
    deviation = differences.std().item() / math.sqrt(differences.numel())
    return Error(
        name,
        decay,
        relative=(differences.norm() / exact.norm()).item(),
        standard_errors=differences.mean().item() / deviation if deviation else 0.0,
    )


def one_thread(run: Callable[..., ErrorRun]) -> Callable[..., ErrorRun]:
    """Tensors this small are faster with one."""

    @wraps(run)
    def with_one_thread(*args: object, **options: object) -> ErrorRun:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return run(*args, **options)
        finally:
            torch.set_num_threads(threads)

    return with_one_thread


@one_thread
def training_run(steps: int = STEPS, rows: Sequence[FollowerRow] = FOLLOWERS) -> ErrorRun:
    """A regression trained by AdamW with cosine decay; everybody averages the same weights."""
    torch.manual_seed(0)
    plain = partial(nn.Linear, bias=False)  # few tensors: most of the time goes into calls for each
    model = nn.Sequential(plain(32, 64), nn.Tanh(), plain(64, 64), nn.Tanh(), plain(64, 1))
    teacher = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 1))
    inputs = torch.randn(4096, 32)
    with torch.no_grad():
        outputs = teacher(inputs) + 0.1 * torch.randn(4096, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    parameters = list(model.parameters())
    followers: dict[str, Follower] = {}
    for row in rows:
        with suppress(ImportError):
            followers[row.name] = row.build(model, DECAYS)
    exact = flat(parameters).double().repeat(len(DECAYS), 1)
    weights = 1 - torch.tensor(DECAYS, dtype=torch.float64)[:, None]
    for step in range(steps):
        start = step * 64 % 4096
        nn.functional.mse_loss(model(inputs[start : start + 64]), outputs[start : start + 64]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        for follower in followers.values():
            follower.update()
        exact.lerp_(flat(parameters).double().expand_as(exact), weights)
    errors = [
        compare(name, decay, average, reference)
        for name, follower in followers.items()
        for decay, average, reference in zip(DECAYS, follower.averages(), exact, strict=True)
    ]
    left_out = [row.name for row in rows if row.name not in followers]
    return ErrorRun(f"AdamW with cosine decay, {flat(parameters).numel()} weights", steps, errors, left_out)


@one_thread
def noisy_run(steps: int = STEPS * NOISY_TIMES_LONGER) -> ErrorRun:
    """Weights that drift and shake, as at a constant learning rate, under an average that is longer than the run."""
    generator = torch.Generator().manual_seed(0)
    begin, drift = torch.randn(2, NOISY_ELEMENTS, generator=generator)
    source = nn.Parameter(begin.clone())
    profile = polyak.Exponential(NOISY_DECAY)
    model = nn.ParameterList([source])
    averages = {
        PLAIN: polyak.WeightAverage(model, profile),
        COMPENSATED: polyak.WeightAverage(model, profile, compensated=True),
    }
    exact = begin.double()
    noise = torch.empty(NOISY_ELEMENTS)
    for step in range(steps):
        with torch.no_grad():
            torch.add(begin, drift, alpha=step / steps, out=source)
            source.add_(noise.normal_(generator=generator), alpha=0.1)
        for average in averages.values():
            average.update()
        exact.lerp_(source.detach().double(), 1 - NOISY_DECAY)
    errors = [
        compare(name, NOISY_DECAY, flat(list(average.weights().values())), exact) for name, average in averages.items()
    ]
    return ErrorRun(f"noise and drift, {NOISY_ELEMENTS} weights", steps, errors)


def both_runs(steps: int = STEPS) -> list[ErrorRun]:
    """Beside each other: each runs on one thread, and nothing is timed."""
    with ProcessPoolExecutor(max_workers=2, mp_context=get_context("spawn")) as pool:
        noisy = pool.submit(noisy_run, steps * NOISY_TIMES_LONGER)
        trained = pool.submit(training_run, steps)
        return [trained.result(), noisy.result()]
