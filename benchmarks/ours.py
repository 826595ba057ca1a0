"""This library, in its modes."""

import torch
from torch import nn

import polyak
from benchmarks.contender import DECAY, Pair, Running, pairs_by_name

# Of several averages the first has the decay that everybody has.
DECAYS = {"a": DECAY, "b": 0.9998, "c": 0.9995, "d": 0.999}


def profiles(count: int) -> dict[str, polyak.Profile]:
    return {name: polyak.Exponential(decay) for name, decay in list(DECAYS.items())[:count]}


def pairs_of(
    average: polyak.WeightAverage, model: nn.Module, *, name: str = "average", decay: float = DECAY
) -> list[Pair]:
    """Holds the averages themselves, because the copies that `weights()` makes would take as much memory again."""
    state = average.state_dict()
    (averages,), (copies,) = state["averages"].values(), state["copies"].values()
    return pairs_by_name({**copies, **averages[name]}, model, decay=decay)


def weight_average(model: nn.Module) -> Running:
    average = polyak.WeightAverage(model, polyak.Exponential(DECAY))
    return Running(average.update, lambda: pairs_of(average, model))


def compensated(model: nn.Module) -> Running:
    average = polyak.WeightAverage(model, polyak.Exponential(DECAY), compensated=True)
    return Running(average.update, lambda: pairs_of(average, model))


def stochastic(model: nn.Module) -> Running:
    average = polyak.WeightAverage(model, polyak.Exponential(DECAY), dtype=torch.bfloat16)
    return Running(average.update, lambda: pairs_of(average, model))


def model_ema(model: nn.Module) -> Running:
    average = polyak.ModelEma(model, decay=DECAY)
    return Running(lambda: average.update(model), lambda: pairs_by_name(average.ema.state_dict(), model))


def together(model: nn.Module, count: int) -> Running:
    """Several profiles in one WeightAverage."""
    average = polyak.WeightAverage(model, profiles(count))

    def pairs() -> list[Pair]:
        return [pair for name in average.profiles for pair in pairs_of(average, model, name=name, decay=DECAYS[name])]

    return Running(average.update, pairs)


def separately(model: nn.Module, count: int) -> Running:
    """As many WeightAverages of one profile each."""
    averages = {name: polyak.WeightAverage(model, profile) for name, profile in profiles(count).items()}

    def update() -> None:
        for average in averages.values():
            average.update()

    def pairs() -> list[Pair]:
        return [pair for name, average in averages.items() for pair in pairs_of(average, model, decay=DECAYS[name])]

    return Running(update, pairs)
