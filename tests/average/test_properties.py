"""Random shapes, profiles, skips and axes against a float64 recursion over the definition of a profile."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import polyak

profiles = st.one_of(
    st.floats(0.0, 0.99999).map(polyak.Exponential),
    st.floats(0.1, 0.99999).map(lambda decay: polyak.Exponential(decay, debias=True)),
    st.floats(0.1, 1e4).map(lambda half_life: polyak.Exponential(half_life=half_life)),
    st.floats(0.01, 0.28).map(lambda std: polyak.Power(relative_std=std)),
    st.just(polyak.Uniform()),
)
shapes = st.lists(st.lists(st.integers(1, 5), max_size=3).map(tuple), min_size=1, max_size=4)
increments = st.lists(st.one_of(st.just(1.0), st.floats(1e-3, 1e6)), min_size=1, max_size=12)


class Tensors(nn.Module):
    def __init__(self, shapes):
        super().__init__()
        self.tensors = nn.ParameterList(torch.randn(shape, dtype=torch.float64) for shape in shapes)


def by_definition(profile, times, iterates):
    """The average as the sum of everything that was ever seen, each with the share that the profile gives it."""
    shares = profile.weights([0.0, *times])
    return [
        sum(share * tensors[i] for share, tensors in zip(shares, iterates, strict=True))
        for i in range(len(iterates[0]))
    ]


@pytest.mark.protects
@settings(deadline=None, max_examples=150)
@given(profile=profiles, shapes=shapes, increments=increments, seed=st.integers(0, 9))
def test_an_average_is_what_its_weights_say(profile, shapes, increments, seed):
    torch.manual_seed(seed)
    model = Tensors(shapes)
    average = polyak.WeightAverage(model, profile)
    times, iterates = [], [[p.detach().clone() for p in model.tensors]]
    for increment in increments:
        with torch.no_grad():
            for parameter in model.tensors:
                parameter.add_(torch.randn_like(parameter))
        times.append(sum(increments[: len(times)]) + increment)
        average.update(at=times[-1])
        iterates.append([p.detach().clone() for p in model.tensors])
    for found, expected in zip(average.weights().values(), by_definition(profile, times, iterates), strict=True):
        torch.testing.assert_close(found, torch.as_tensor(expected), rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=60)
@given(profile=profiles, every=st.integers(1, 7), start=st.integers(0, 9), num_calls=st.integers(1, 25))
def test_skipped_calls_change_nothing_for_a_source_that_stands_still_between_them(profile, every, start, num_calls):
    """Growth is additive: one update in k calls is k updates with the same weights."""
    torch.manual_seed(0)
    model = Tensors([(3,), ()])
    skipping = polyak.WeightAverage(model, profile, every=every, start=start * every)
    always = polyak.WeightAverage(model, profile, start=start * every)
    for call in range(num_calls * every):
        if call % every == 0:
            with torch.no_grad():
                for parameter in model.tensors:
                    parameter.add_(torch.randn_like(parameter))
        skipping.update()
        always.update()
    for found, expected in zip(skipping.weights().values(), always.weights().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(profile=profiles, values=st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1))
def test_finite_weights_that_stand_still_are_their_own_average(profile, values):
    model = nn.Module()
    model.weight = nn.Parameter(torch.tensor(values, dtype=torch.float32))
    average = polyak.WeightAverage(model, profile)
    for _ in range(5):
        average.update()
    # Equal as numbers is equal as bits but for the sign of a zero, which torch.lerp does not keep.
    assert torch.equal(average.weights()["weight"], model.weight)


@settings(deadline=None, max_examples=100)
@given(profile=profiles, increments=increments)
def test_the_shares_of_all_weights_sum_to_one(profile, increments):
    times = [0.0]
    for increment in increments:
        times.append(times[-1] + increment)
    assert math.isclose(math.fsum(profile.weights(times)), 1.0, rel_tol=1e-12)
