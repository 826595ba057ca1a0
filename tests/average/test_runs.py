"""What runs do that breaks averages elsewhere: updates, frozen parameters, NaNs, attached optimizers."""

import copy

import pytest
import torch
from torch import nn

import polyak
import zoo

pytestmark = pytest.mark.filterwarnings("ignore:the average is .* after 0 updates")

HALF = polyak.Exponential(0.5)


class TestUpdates:
    @pytest.mark.protects
    def test_a_failed_update_changes_nothing(self):
        model = zoo.mlp()
        ema = polyak.ModelEma(model, 0.5)
        ema.ema.double()
        with pytest.raises(polyak.MismatchError):
            ema.update(nn.Linear(3, 3))
        before = ema.ema[0].weight.clone()
        zoo.bump(model)
        ema.update(model)
        torch.testing.assert_close(ema.ema[0].weight, before + 0.5)

    def test_an_error_about_a_frozen_parameter_does_not_leave_the_old_tensors(self):
        model = zoo.mlp()
        model[0].requires_grad_(False)
        average = polyak.WeightAverage(model, HALF)
        model[2].weight = nn.Parameter(model[2].weight.detach().clone())
        model[0].requires_grad_(True)
        with pytest.raises(polyak.StateError, match=r"'0.weight' was frozen"):
            average.update()
        model[0].requires_grad_(False)
        nn.init.ones_(model[2].weight)
        before = average.weights()["2.weight"]
        average.update()
        torch.testing.assert_close(average.weights()["2.weight"], (before + 1) / 2)

    def test_an_interrupted_update_does_not_count_twice(self, monkeypatch):
        model = zoo.mlp()
        average = polyak.WeightAverage(model, HALF)
        before = average.weights()["0.bias"]
        zoo.bump(model)
        plan = type(average._core.store.updates.plan)
        monkeypatch.setattr(plan, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            average.update()
        monkeypatch.undo()
        average.update()
        torch.testing.assert_close(average.weights()["0.bias"], before + 0.5)

    @pytest.mark.protects
    def test_freed_memory_is_not_read(self):
        model = zoo.mlp()
        average = polyak.WeightAverage(model)
        before = zoo.clone(average._core.store.averages["average"])
        model[0].weight.untyped_storage().resize_(0)
        with pytest.raises(polyak.StateError, match=r"the memory of '0.weight' was freed, by offloading or sharding"):
            average.update()
        assert zoo.bit_equal(average._core.store.averages["average"], before)

    def test_transposed_data_at_the_same_address(self):
        model = nn.Linear(3, 3, bias=False)
        average = polyak.WeightAverage(model, polyak.Exponential(0.0))
        model.weight.data = model.weight.data.t()
        average.report()
        average.update()
        assert torch.equal(average.weights()["weight"], model.weight)

    @pytest.mark.parametrize("at", ["7", True, None.__class__, torch.tensor([1.0, 2.0]), 10**400])
    def test_times_that_are_no_numbers(self, at):
        average = polyak.WeightAverage(zoo.mlp())
        with pytest.raises(TypeError, match=r"update\(at=.*\): a finite number is needed"):
            average.update(at=at)

    def test_backward_after_an_update(self):
        model = zoo.mlp()
        average = polyak.WeightAverage(model)
        loss = model(torch.ones(1, 6)).sum()
        average.update()
        loss.backward()

    def test_reset(self):
        model = zoo.mlp()
        average = polyak.WeightAverage(model, polyak.Exponential(0.9))
        for _ in range(3):
            zoo.bump(model)
            average.update()
        average.reset()
        assert (average.num_updates, average.time) == (0, 0)
        assert zoo.bit_equal(average.weights(), dict(model.state_dict()))

    def test_write_back(self):
        model = zoo.mlp()
        average = polyak.WeightAverage(model, HALF)
        zoo.bump(model)
        average.update()
        kept = average.weights()
        average.write_back()
        assert zoo.bit_equal(dict(model.state_dict()), kept)
        assert zoo.bit_equal(average.weights(), kept)

    def test_adapt_follows_a_model_that_changed_on_purpose(self):
        model = zoo.mlp()
        average = polyak.WeightAverage(model, {"half": HALF, "mean": polyak.Uniform()})
        zoo.bump(model)
        average.update()
        kept = average["half"].weights()["0.weight"]
        model[2] = nn.Linear(5, 7)
        with pytest.raises(polyak.MismatchError, match=r"'2.weight' of the model has the shape \(7, 5\)"):
            average.update()
        average.adapt()
        assert torch.equal(average["half"].weights()["0.weight"], kept)
        assert torch.equal(average["half"].weights()["2.weight"], model[2].weight)
        average.update()
        assert average.num_updates == 2


class TestFrozen:
    def frozen(self):
        model = zoo.mlp()
        model[0].requires_grad_(False)
        average = polyak.WeightAverage(model)
        average.update()
        return model, average

    @pytest.mark.protects
    def test_a_changed_value_raises_where_it_would_be_mixed_in(self, tmp_path):
        model, average = self.frozen()
        model[0].weight.data[0, 0] += 1
        for call in (average.state_dict, average.swap_in, lambda: average.export(tmp_path / "x.safetensors")):
            with pytest.raises(polyak.StateError, match=r"'0.weight' is frozen .* has changed since"):
                call()
        assert not average.is_swapped
        average.update()

    @pytest.mark.parametrize("order", ["model first", "average first"])
    def test_resuming_in_any_order(self, order):
        model, average = self.frozen()
        weights, state = zoo.clone(model.state_dict()), copy.deepcopy(average.state_dict())
        other, fresh = self.frozen()
        loads = [lambda: other.load_state_dict(weights), lambda: fresh.load_state_dict(state)]
        for load in loads if order == "model first" else loads[::-1]:
            load()
        with fresh.swapped():
            pass
        assert zoo.bit_equal(fresh.weights(), average.weights())


class TestNonFinite:
    def poison(self, model):
        with torch.no_grad():
            model[2].bias[0] = float("nan")

    @pytest.mark.protects
    @pytest.mark.parametrize("name", ["mlp", "batchnorm", "bfloat16"])
    def test_skip_equals_a_run_without_that_update(self, name):
        model = zoo.MODELS[name]()
        average = polyak.WeightAverage(model, polyak.Power(), nonfinite="skip")
        reference = polyak.WeightAverage(model, polyak.Power())
        for step in range(1, 9):
            zoo.drift(model)
            if step in (3, 4, 7):
                kept = zoo.clone(model.state_dict())
                with torch.no_grad():
                    next(model.parameters()).view(-1)[0] = float("inf") if step == 3 else float("nan")
                average.update(at=step)
                model.load_state_dict(kept)
            else:
                average.update(at=step)
                reference.update(at=step)
        assert zoo.bit_equal(average.weights(), reference.weights())
        assert average.report().num_skipped == 3
        resumed = polyak.WeightAverage(model, polyak.Power(), nonfinite="skip")
        resumed.load_state_dict(copy.deepcopy(average.state_dict()))
        assert resumed.report().num_skipped == 3
        resumed.reset()
        assert resumed.report().num_skipped == 0

    @pytest.mark.protects
    def test_raise_names_the_tensors_and_writes_nothing(self):
        model = zoo.mlp()
        average = polyak.WeightAverage(model, HALF, nonfinite="raise")
        before = average.weights()
        zoo.bump(model)
        self.poison(model)
        with pytest.raises(polyak.StateError, match=r"NaNs or infinities in '2.bias'.*nonfinite='skip'"):
            average.update()
        assert zoo.bit_equal(average.weights(), before)
        assert average.num_updates == 0

    def test_propagate_is_the_default(self):
        model = zoo.mlp()
        average = polyak.WeightAverage(model, HALF)
        self.poison(model)
        average.update()
        assert average.weights()["2.bias"].isnan().sum() == 1

    def test_large_finite_values_are_finite(self):
        model = nn.Linear(4, 4)
        nn.init.constant_(model.weight, 3e38)
        average = polyak.WeightAverage(model, HALF, nonfinite="raise")
        average.update()
        assert average.num_updates == 1


class TestAttach:
    def train(self, model, optimizer, num_batches, accumulation=1, scaler=None, overflow_at=()):
        for batch in range(1, num_batches + 1):
            loss = model(torch.randn(3, 6)).square().mean()
            (scaler.scale(loss) if scaler else loss).backward()
            if batch % accumulation == 0:
                if batch in overflow_at:
                    model[0].weight.grad.fill_(float("inf"))
                if scaler:
                    scaler.step(optimizer)
                    scaler.update()
                else:
                    optimizer.step()
                optimizer.zero_grad()

    @pytest.mark.protects
    def test_counts_optimizer_steps_and_not_batches(self):
        model = zoo.mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        average, by_hand = polyak.WeightAverage(model), polyak.WeightAverage(model)
        handle = average.attach(optimizer)
        optimizer.register_step_post_hook(lambda *_: by_hand.update())
        self.train(model, optimizer, 12, accumulation=4)
        assert average.num_updates == 3
        assert zoo.bit_equal(average.weights(), by_hand.weights())
        with pytest.raises(polyak.StateError, match=r"update\(\) where an optimizer is attached would count twice"):
            average.update()
        handle.detach()
        handle.detach()
        self.train(model, optimizer, 4)
        assert average.num_updates == 3
        average.update()

    @pytest.mark.protects
    @pytest.mark.parametrize("fused", [False, True])
    def test_steps_that_a_grad_scaler_skips_are_none(self, fused):
        model = zoo.mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        average = polyak.WeightAverage(model)
        average.attach(optimizer)
        self.train(model, optimizer, 6, scaler=scaler, overflow_at=(2, 5))
        assert average.num_updates == 4

    @pytest.mark.protects
    def test_several_optimizers_make_one_update_a_round(self):
        model = zoo.mlp()
        optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (model[0], model[2])]
        average = polyak.WeightAverage(model)
        average.attach(*optimizers)
        for optimizer in (optimizers[0], optimizers[0], optimizers[1], optimizers[1], optimizers[0]):
            model(torch.randn(3, 6)).sum().backward()
            optimizer.step()
        assert average.num_updates == 2

    def test_one_optimizer_given_twice_is_one(self):
        model = zoo.mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        average = polyak.WeightAverage(model)
        average.attach(optimizer, optimizer)
        self.train(model, optimizer, 3)
        assert average.num_updates == 3

    def test_a_wrapper_without_hooks_counts_what_it_passes_on(self):
        class Accumulating(torch.optim.Optimizer):
            """As accelerate's: every other step is passed on, and nothing of torch's own is there."""

            def __init__(self, optimizer):
                self.optimizer = optimizer
                self.num_calls = 0

            @property
            def param_groups(self):
                return self.optimizer.param_groups

            def step(self, closure=None):
                self.num_calls += 1
                if self.num_calls % 2 == 0:
                    self.optimizer.step(closure)

            def zero_grad(self, set_to_none=True):
                self.optimizer.zero_grad(set_to_none)

        model = zoo.mlp()
        optimizer = Accumulating(torch.optim.SGD(model.parameters(), lr=0.1))
        average = polyak.WeightAverage(model)
        handle = average.attach(optimizer, optimizer.optimizer)
        self.train(model, optimizer, 6)
        assert average.num_updates == 3
        handle.detach()
        self.train(model, optimizer, 2)
        assert average.num_updates == 3

    def test_on_another_time_axis(self):
        model = zoo.mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        average = polyak.WeightAverage(model)
        seen = iter([32, 64, 80])
        average.attach(optimizer, at=lambda: next(seen))
        self.train(model, optimizer, 3)
        assert average.time == 80

    def test_impossible_calls(self):
        model = zoo.mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        average = polyak.WeightAverage(model)
        for wrong in ((), (model,)):
            with pytest.raises(TypeError, match=r"attach: .* is needed"):
                average.attach(*wrong)
        with pytest.raises(TypeError, match=r"attach: at=5 is no function; it gives the time"):
            average.attach(optimizer, at=5)
        with pytest.raises(ValueError, match=r"attach: this SGD trains no parameter of the model"):
            average.attach(torch.optim.SGD(zoo.mlp().parameters(), lr=0.1))
        average.attach(optimizer)
        with pytest.raises(polyak.StateError, match=r"an optimizer is attached already"):
            average.attach(optimizer)
