"""Writes the state file of the version that is installed; run once for each release, and never again.

python tests/data/make_state.py
"""

from pathlib import Path

import torch
from torch import nn

import polyak


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[3].weight = model[2].weight
    model[0].bias.requires_grad_(False)
    return model


def make_average(model: nn.Module) -> polyak.WeightAverage:
    profiles = {"power": polyak.Power(relative_std=0.1), "ema": polyak.Exponential(half_life=3, debias=True)}
    return polyak.WeightAverage(model, profiles, every=2, start=2)


def train(model: nn.Module, average: polyak.WeightAverage, steps: range) -> None:
    for step in steps:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.linspace(-step, step, parameter.numel()).view_as(parameter))
        average.update()


if __name__ == "__main__":
    model = make_model()
    average = make_average(model)
    train(model, average, range(1, 8))
    torch.save(average.state_dict(), Path(__file__).parent / f"state-{polyak.__version__}.pt")
