"""Averages whose updates the device decides about, with the kernel in Triton's interpreter; run by `test_triton`."""

import copy
import os
from contextlib import contextmanager

import pytest
import torch

import polyak
import zoo
from polyak.average import core as core_module
from polyak.kernels.gpu import control
from polyak.store import OnDevice
from polyak.store.updates.inline import Inline

# The interpreter computes with NumPy, which warns of infinities and NaNs.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

# In Triton's interpreter tensors are on the CPU; `test_gpu_cases` runs the same on a GPU.
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
PROFILES = {"short": polyak.Exponential(0.9), "long": polyak.Power(relative_std=0.1)}
RULES = {torch.nn.BatchNorm2d: "copy"}


@pytest.fixture(autouse=True)
def triton_for_all(monkeypatch):
    monkeypatch.setenv("POLYAK_KERNELS", "triton,staged")


def pair(profile, *, host_options=None, **options):
    """A model with an average that the device decides about, and a twin whose average the host decides about."""
    torch.manual_seed(0)
    model = zoo.batchnorm().to(DEVICE)
    twin = copy.deepcopy(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYAK_KERNELS", "staged")
        host = polyak.WeightAverage(twin, profile, rules=RULES, **(host_options or options))
    return model, polyak.WeightAverage(model, profile, rules=RULES, **options), twin, host


def drift(*models, seed):
    for model in models:
        zoo.drift(model, torch.Generator().manual_seed(seed))


def weights(average):
    return {f"{name}/{key}": t for name in average.profiles for key, t in average[name].weights().items()}


MODES = [{}, {"compensated": True}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("bad", [[], [3], [0], [2, 3]])
def test_a_bad_step_is_left_out_and_its_growth_applied_later(bad, mode):
    model, average, twin, host = pair(polyak.Exponential(0.9), nonfinite="skip", **mode)
    for step in range(6):
        drift(model, twin, seed=step)
        kept = model[0].weight.detach().clone()
        if step in bad:
            before = average.weights()
            with torch.no_grad():
                model[0].weight[0, 0] = twin[0].weight[0, 0] = float("nan")
                model[1].running_mean[0] = twin[1].running_mean[0] = float("inf")
        average.update(), host.update()
        if step in bad:
            assert zoo.bit_equal(average.weights(), before)
            with torch.no_grad():
                for each in (model, twin):
                    each[0].weight.copy_(kept)
                    each[1].running_mean.zero_()
    assert isinstance(average._core.store.updates, OnDevice)
    assert isinstance(host._core.store.updates, Inline)
    assert zoo.bit_equal(average.weights(), host.weights())
    assert (average.num_updates, average.report().num_skipped) == (6 - len(bad), len(bad))


class LateEvent:
    """A CUDA event without a GPU: not over at once, but when the device has reached it."""

    def __init__(self):
        self.is_over = True

    def record(self, stream):
        self.is_over = False

    def query(self):
        return self.is_over


@pytest.fixture
def finish(monkeypatch):
    """Lets the device finish its work."""
    if DEVICE.type == "cuda":
        return torch.cuda.synchronize
    events = []
    monkeypatch.setattr(control, "new_event", lambda device: events.append(LateEvent()) or events[-1])
    return lambda: [setattr(event, "is_over", True) for event in events]


@contextmanager
def spoilt(model):
    """Puts a NaN into the model for a while."""
    kept = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
        yield
        model[0].weight.copy_(kept)


HELD_EARLIER = r"held at an earlier update NaNs or infinities in '0.weight', which"


@pytest.mark.protects
@pytest.mark.parametrize("num_good", [0, 1, 2])
def test_raise_comes_with_the_next_call_and_names_the_tensor(num_good, finish):
    """Also if the device has not yet done the updates before."""
    model, average, *_ = pair(polyak.Exponential(0.9), nonfinite="raise")
    for step in range(num_good):
        drift(model, seed=step)
        average.update()
    with spoilt(model):
        average.update()
    finish()
    before = average.weights()
    with pytest.raises(polyak.StateError, match=HELD_EARLIER):
        average.update()
    assert zoo.bit_equal(average.weights(), before)
    drift(model, seed=7)
    average.update()
    finish()
    average.update()
    assert not zoo.bit_equal(average.weights(), before)
    assert average.num_updates == num_good + 2


@pytest.mark.protects
def test_raise_in_a_graph_comes_with_the_second_next_advance(finish):
    """The first one orders the verdict, after the replay."""
    model, average, *_ = pair(polyak.Exponential(0.9), nonfinite="raise")
    average.advance()
    updates = average._core.store.updates
    with spoilt(model):
        updates.run(look=True)
    finish()
    average.advance()
    updates.run(look=True)
    finish()
    with pytest.raises(polyak.StateError, match=HELD_EARLIER):
        average.advance()
    average.advance()
    updates.run(look=True)
    assert average.num_updates == 2


@pytest.mark.protects
def test_raise_comes_after_the_model_got_other_memory_too():
    model, average, *_ = pair(polyak.Exponential(0.9), nonfinite="raise")
    with spoilt(model):
        average.update()
    model[0].weight.data = model[0].weight.data.clone()
    average.weights()
    with pytest.raises(polyak.StateError, match=HELD_EARLIER):
        average.update()
    average.update()
    assert average.num_updates == 1


@pytest.mark.protects
def test_wait_raises_for_the_last_replay():
    model, average, *_ = pair(polyak.Exponential(0.9), nonfinite="raise")
    average.advance()
    with spoilt(model):
        average._core.store.updates.run(look=True)
    with pytest.raises(polyak.StateError, match=HELD_EARLIER):
        average.wait()
    average.wait()


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_restart_after_a_bad_step_takes_what_is_pending_along(mode):
    model, average, *_ = pair(PROFILES, nonfinite="skip", **mode)
    for step in range(3):
        drift(model, seed=step)
        average.update()
    kept = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.fill_(float("inf"))
    average.update()
    with torch.no_grad():
        model[0].weight.copy_(kept)
    state = copy.deepcopy(average.state_dict())
    assert min(state["pending"].values()) > 0
    assert state["clock"]["num_updates"] == 3
    twin = copy.deepcopy(model)
    resumed = polyak.WeightAverage(twin, PROFILES, rules=RULES, nonfinite="skip", **mode)
    resumed.load_state_dict(state)
    copied = copy.deepcopy({"model": model, "average": average})
    for step in range(3, 5):
        drift(model, twin, copied["model"], seed=step)
        average.update(), resumed.update(), copied["average"].update()
    assert zoo.bit_equal(weights(average), weights(resumed))
    assert zoo.bit_equal(weights(average), weights(copied["average"]))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_what_a_graph_would_replay(mode, monkeypatch):
    """The captured update is `OnDevice.run`; each replay applies the growth of the moment."""
    model, average, twin, host = pair(PROFILES, every=2, **mode)
    average.advance()
    with monkeypatch.context() as patch:
        # A capture only records. Here what is recorded runs, but no update is due at the first of two calls.
        patch.setattr(core_module, "is_capturing", lambda: True)
        average.update()
    for step in range(6):
        drift(model, twin, seed=step)
        if step:
            average.advance()
        average._core.store.updates.run(look=False)
        host.update()
        assert zoo.bit_equal(weights(average), weights(host))
    assert average.num_updates == host.num_updates == 3
    assert average.time == host.time == 6


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_a_captured_update_needs_advance(nonfinite, monkeypatch):
    _, average, *_ = pair(polyak.Exponential(0.9), nonfinite=nonfinite)
    monkeypatch.setattr(core_module, "is_capturing", lambda: True)
    with pytest.raises(polyak.StateError, match=r"call advance\(\) before the capture and before each replay"):
        average.update()
    average.advance()
    with pytest.raises(ValueError, match=r"give the time to advance\(at=...\)"):
        average.update(at=3)


def test_reset_and_new_tensors():
    model, average, twin, host = pair(PROFILES, nonfinite="skip")
    for each in (average, host):
        each.update()
        each.reset()
    assert (average.num_updates, average.time) == (0, 0)
    with torch.no_grad():
        for each in (model, twin):
            each[0].weight = torch.nn.Parameter(each[0].weight.clone())
    for step in range(3):
        drift(model, twin, seed=step)
        average.update(), host.update()
    assert zoo.bit_equal(weights(average), weights(host))


def test_copies_wait_for_an_update_that_is_due():
    model, average, twin, host = pair(PROFILES, nonfinite="skip", every=2)
    for step in range(5):
        drift(model, twin, seed=step)
        average.update(), host.update()
        assert zoo.bit_equal(weights(average), weights(host))


def test_an_update_without_growth_counts():
    model, average, twin, host = pair(polyak.Exponential(1.0), nonfinite="skip", dtype=torch.bfloat16)
    for step in range(3):
        drift(model, twin, seed=step)
        average.update(), host.update()
    assert average.num_updates == host.num_updates == 3
    assert average.report().num_skipped == 0
    assert zoo.bit_equal(average.weights(), host.weights())


def test_adapt_takes_what_is_pending_along():
    model, average, twin, host = pair(polyak.Exponential(0.9), nonfinite="skip", dtype=torch.bfloat16)
    for step in range(4):
        drift(model, twin, seed=step)
        kept = model[0].weight.detach().clone()
        if step == 2:
            with torch.no_grad():
                model[0].weight.fill_(float("nan"))
                twin[0].weight.fill_(float("nan"))
        average.update(), host.update()
        with torch.no_grad():
            model[0].weight.copy_(kept)
            twin[0].weight.copy_(kept)
    for each in (average, host):
        each.adapt()
    drift(model, twin, seed=9)
    average.update(), host.update()
    assert average.num_updates == host.num_updates == 4
    assert zoo.bit_equal(average.weights(), host.weights())
