"""Calls that are interrupted anywhere, and graphs that need averages as they were."""

import copy
import functools
import gc

import pytest
import torch

import polyak
import zoo
from interrupts import every_interruption

pytestmark = pytest.mark.filterwarnings("ignore:the average is .* after 0 updates")

HALF = polyak.Exponential(0.5)


class TestInterruptions:
    """Clock and updates go on together, wherever a call is interrupted."""

    @staticmethod
    def make(**options):
        torch.manual_seed(0)
        model = zoo.mlp()
        average = polyak.WeightAverage(model, polyak.Exponential(0.5), **options)
        for _ in range(3):
            zoo.drift(model)
            average.update()
        zoo.drift(model)
        return model, average

    @staticmethod
    def assert_goes_on(model, average):
        state = copy.deepcopy(average.state_dict())
        average.load_state_dict(state)
        clock = state["clock"]
        assert clock["updated_at"] <= clock["time"]
        assert clock["num_updates"] <= clock["num_calls"]
        before = average.weights()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        average.update()
        assert not zoo.bit_equal(average.weights(), before)

    @pytest.mark.protects
    @pytest.mark.parametrize("nonfinite", ["propagate", "raise"])
    def test_an_update(self, nonfinite):
        found = set()
        make = functools.partial(self.make, nonfinite=nonfinite)
        for model, average in every_interruption(make, lambda made: made[1].update()):
            clock = average.state_dict()["clock"]
            assert clock["updated_at"] == clock["time"] == clock["num_updates"] == clock["num_calls"]
            found.add(clock["time"])
            self.assert_goes_on(model, average)
        assert found == {3.0, 4.0}

    @pytest.mark.protects
    def test_an_update_with_a_live_module(self):
        def make():
            model, average = self.make()
            return model, average, average.live_module()

        for model, average, _ in every_interruption(make, lambda made: made[1].update()):
            self.assert_goes_on(model, average)

    @pytest.mark.protects
    def test_a_reset(self):
        for model, average in every_interruption(self.make, lambda made: made[1].reset()):
            assert average.time in (0, 3)
            assert average.num_updates == average.time
            self.assert_goes_on(model, average)

    @pytest.mark.protects
    def test_loading_a_state(self):
        model, average = self.make()
        for _ in range(5):
            average.update()
        state = copy.deepcopy(average.state_dict())
        for model, average in every_interruption(self.make, lambda made: made[1].load_state_dict(state)):
            assert average.time in (3, 8)
            assert average.num_updates == average.time
            self.assert_goes_on(model, average)


class TestWhoHoldsTheAverages:
    """A graph that was built on averages, and needs them as they were, must not give other gradients."""

    @staticmethod
    def graph(average, model):
        inputs = torch.randn(4, 6, requires_grad=True)
        module = average.live_module()
        loss = module(inputs).square().sum()
        zoo.bump(model)
        return module, loss

    @pytest.mark.protects
    @pytest.mark.parametrize("call", ["update", "reset"])
    @pytest.mark.parametrize("is_dropped", [True, False], ids=["dropped", "kept"])
    def test_it_is_told_of_changes(self, call, is_dropped):
        model = zoo.mlp()
        average = polyak.WeightAverage(model, HALF)
        module, loss = self.graph(average, model)
        if is_dropped:
            del module
            gc.collect()
        getattr(average, call)()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_it_is_not_told_of_an_update_that_was_left_out(self):
        model = zoo.mlp()
        average = polyak.WeightAverage(model, HALF, nonfinite="skip")
        _, loss = self.graph(average, model)
        with torch.no_grad():
            model[0].weight[0, 0] = float("nan")
        average.update()
        loss.backward()
