"""What a contender is: how it is built for a model, what is timed, and which averages are checked afterwards."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from torch import Tensor, nn

DECAY = 0.9999
WEIGHT = 1 - DECAY


class Kind(Enum):
    OURS = "ours"
    PEER = "peer"
    SEED = "seed"
    REFERENCE = "reference"
    LIMIT = "limit"


@dataclass(frozen=True)
class Pair:
    """An average, the tensor that it averages, how often one update averages it, and with which decay."""

    average: Tensor
    source: Tensor
    times: int = 1
    decay: float = DECAY


@dataclass(frozen=True)
class Running:
    """A contender at work on one model: what is timed, and what is checked afterwards; a mere copy has no averages."""

    update: Callable[[], object]
    pairs: Callable[[], list[Pair]] | None

    def checked(self) -> list[Pair]:
        return self.pairs() if self.pairs else []


@dataclass(frozen=True)
class Contender:
    """One row of a table.

    Attributes:
        name: unique in its suite.
        kind: what it is to the comparison.
        build: sets it to work on a model.
        num_averages: how many averages of the whole model it keeps, for the memory that it takes.
    """

    name: str
    kind: Kind
    build: Callable[[nn.Module], Running]
    num_averages: int = 1


def floating_entries(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


def once_each(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of tied names only the first."""
    first_names: dict[int, str] = {}
    for name, tensor in tensors.items():
        first_names.setdefault(tensor.data_ptr(), name)
    return {name: tensors[name] for name in first_names.values()}


def pairs_by_name(averages: dict[str, Tensor], model: nn.Module, decay: float = DECAY) -> list[Pair]:
    return [Pair(averages[name], source, decay=decay) for name, source in once_each(floating_entries(model)).items()]


def pairs_by_every_name(averages: dict[str, Tensor], model: nn.Module) -> list[Pair]:
    """For loops over names: what has two names is averaged twice."""
    sources = floating_entries(model)
    names = Counter(source.data_ptr() for source in sources.values())
    return [Pair(averages[name], source, names[source.data_ptr()]) for name, source in once_each(sources).items()]


def pairs_in_order(averages: list[Tensor], model: nn.Module) -> list[Pair]:
    """For lists of parameters."""
    sources = [parameter.detach() for parameter in model.parameters()]
    return [Pair(average.detach(), source) for average, source in zip(averages, sources, strict=True)]
