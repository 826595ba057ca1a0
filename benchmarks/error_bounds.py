"""What errors have to stay below."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.error import NOISY_DECAY, ErrorRun
from benchmarks.followers import COMPENSATED, PLAIN, STOCHASTIC


@dataclass(frozen=True)
class ErrorBound:
    """At most this relative error, or this many standard errors of the mean from zero."""

    name: str
    decay: float
    most_relative: float
    most_standard_errors: float | None = None


@dataclass(frozen=True)
class ErrorVerdict:
    what: str
    bound: float
    value: float

    @property
    def reached(self) -> bool:
        return abs(self.value) <= self.bound


BOUNDS = (
    ErrorBound(PLAIN, 0.9999, 1.5e-5),
    ErrorBound(COMPENSATED, 0.9999, 4e-8),
    ErrorBound(COMPENSATED, NOISY_DECAY, 4e-8),
    ErrorBound(STOCHASTIC, 0.9999, 4e-2, most_standard_errors=3),
)


def error_verdicts(runs: Sequence[ErrorRun]) -> list[ErrorVerdict]:
    found: list[ErrorVerdict] = []
    for bound in BOUNDS:
        for run in runs:
            error = run.of(bound.name, bound.decay)
            if error is None:
                continue
            what = f"{bound.name}, decay {bound.decay}, {run.steps} steps"
            found.append(ErrorVerdict(f"{what}: relative error", bound.most_relative, error.relative))
            if bound.most_standard_errors is not None:
                found.append(
                    ErrorVerdict(f"{what}: mean, in standard errors", bound.most_standard_errors, error.standard_errors)
                )
    return found
