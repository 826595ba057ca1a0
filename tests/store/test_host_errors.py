"""Averages on the host where something goes wrong: steps that are not finite, a worker that fails, and copies."""

import copy
import threading

import pytest
import torch

import polyak
import zoo
from host_cases import MODES, PROFILES, SECONDS, Held, assert_same, drift, pair, weights
from polyak.store.updates import host

pytestmark = pytest.mark.filterwarnings("ignore:the average is .* after 0 updates")


# Steps that are not finite.


@pytest.mark.protects
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("bad", [[], [0], [3], [2, 3, 5]])
def test_a_bad_step_is_left_out_and_its_growth_applied_later(machine, here, bad, mode):
    model, average, twin, right = pair(here, profile=polyak.Exponential(0.5), nonfinite="skip", **mode)
    for step in range(6):
        drift(model, twin, seed=step)
        kept = model[0].weight.detach().clone()
        if step in bad:
            with torch.no_grad():
                model[0].weight[0, 0] = twin[0].weight[0, 0] = float("nan")
        average.update(), right.update()
        if step == 4:
            average.wait()
        with torch.no_grad():
            model[0].weight.copy_(kept), twin[0].weight.copy_(kept)
        if step % 2:
            average.wait()
    assert average.num_updates == right.num_updates == 6 - len(bad)
    assert average.report().num_skipped == len(bad)
    assert zoo.bit_equal(weights(average), weights(right))
    drift(model, twin, seed=9)
    average.update(), right.update()
    assert zoo.bit_equal(weights(average), weights(right))


@pytest.mark.parametrize("through", ["update", "wait"])
def test_what_is_not_finite_is_raised_at_the_next_call(machine, here, through):
    model, average, twin, right = pair(here, zoo.mlp, polyak.Exponential(0.9), nonfinite="raise")
    kept = zoo.clone(model.state_dict())
    with torch.no_grad():
        model[0].weight.fill_(float("inf"))
    average.update()
    average._core.store.updates.settle()
    with pytest.raises(polyak.StateError, match=r"held at an earlier update NaNs or infinities in '0\.weight'"):
        getattr(average, through)()
    model.load_state_dict(kept)
    average.wait()
    drift(model, twin, seed=0)
    average.update(), right.update(at=2)
    assert average.num_updates == 1
    assert zoo.bit_equal(average.weights(), right.weights())


@pytest.mark.protects
@pytest.mark.parametrize("through", ["update", "wait"])
def test_it_is_raised_after_the_model_got_other_memory_too(machine, through):
    model = zoo.mlp()
    average = polyak.WeightAverage(model, polyak.Exponential(0.9), device="cpu", nonfinite="raise")
    kept = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.fill_(float("inf"))
    average.update()
    average._core.store.updates.settle()
    model[0].weight.data = kept
    average.weights()
    with pytest.raises(polyak.StateError, match=r"held at an earlier update NaNs or infinities in '0\.weight'"):
        getattr(average, through)()
    getattr(average, through)()


def test_a_state_takes_along_what_a_bad_step_left_pending(machine, here):
    model, average, *_ = pair(here, zoo.mlp, nonfinite="skip")
    drift(model, seed=0)
    average.update()
    kept = zoo.clone(model.state_dict())
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    average.update()
    model.load_state_dict(kept)
    state = copy.deepcopy(average.state_dict())
    assert min(state["pending"].values()) > 0
    assert state["clock"]["num_updates"] == 1
    twin = copy.deepcopy(model)
    resumed = polyak.WeightAverage(twin, PROFILES, device="cpu", nonfinite="skip")
    resumed.load_state_dict(state)
    copied = copy.deepcopy({"model": model, "average": average})
    drift(model, twin, copied["model"], seed=1)
    for each in (average, resumed, copied["average"]):
        each.update()
        each.wait()
        assert each.num_updates == 2
    assert_same(average, resumed)
    assert_same(average, copied["average"])


# What goes wrong in the worker.


class BrokenError(Exception):
    pass


@pytest.fixture
def broken(monkeypatch):
    """Makes updates fail, after something was written."""

    def fail(average):
        def run(self, weights, number):
            next(iter(average._core.store.averages["average"].values())).fill_(7.0)
            raise BrokenError("no more")

        with monkeypatch.context() as patch:
            patch.setattr(host._Set, "run", run)
            average.update()
            average._core.store.updates.settle()

    return fail


CALLS = {
    "update": lambda average, path: average.update(),
    "wait": lambda average, path: average.wait(),
    "state_dict": lambda average, path: average.state_dict(),
    "swapped": lambda average, path: average.swap_in(),
    "weights": lambda average, path: average.weights(),
    "export": lambda average, path: average.export(path / "file.safetensors"),
    "module": lambda average, path: average.module(),
    "report": lambda average, path: average.report(),
    "adapt": lambda average, path: average.adapt(),
    "deepcopy": lambda average, path: copy.deepcopy(average),
}


@pytest.mark.protects
@pytest.mark.parametrize("call", CALLS)
def test_an_error_of_the_worker_is_raised_by_each_call(machine, here, broken, call, tmp_path):
    _, average, *_ = pair(here, zoo.mlp, polyak.Exponential(0.9))
    broken(average)
    for _ in range(2):
        with pytest.raises(polyak.StateError, match="an update on the host failed: BrokenError: no more") as raised:
            CALLS[call](average, tmp_path)
        assert isinstance(raised.value.__cause__, BrokenError)
        assert "load_state_dict(), or begin again by reset()" in str(raised.value)
        assert not average.is_swapped
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["load", "reset"])
def test_after_an_error_it_goes_on_from_a_state_or_the_beginning(machine, here, broken, how):
    model, average, twin, right = pair(here, zoo.mlp, polyak.Exponential(0.9))
    drift(model, twin, seed=0)
    average.update(), right.update()
    state = copy.deepcopy(average.state_dict())
    broken(average)
    if how == "load":
        average.load_state_dict(state)
    else:
        average.reset(), right.reset()
    assert average.num_updates == right.num_updates
    drift(model, twin, seed=1)
    average.update(), right.update()
    assert zoo.bit_equal(average.weights(), right.weights())


def test_nothing_is_done_after_an_error(machine, here, monkeypatch):
    _, average, *_ = pair(here, zoo.mlp, polyak.Exponential(0.9))
    runs = []

    def run(self, weights, number):
        runs.append(number)
        raise BrokenError

    monkeypatch.setattr(host._Set, "run", run)
    with machine.busy():
        average.update(), average.update()
    average._core.store.updates.settle()
    assert runs == [1]


@pytest.mark.protects
def test_what_is_left_out_after_an_error_waits_for_its_copy(machine, here, monkeypatch):
    """Its staging memory is free then: a swap may keep the weights in it."""
    _, average, *_ = pair(here, zoo.mlp, polyak.Exponential(0.9))
    second, waited = threading.Event(), []

    class Second:
        def __init__(self, make, gate, holds):
            pass

        def is_made(self):
            return True

        def wait(self):
            assert second.wait(SECONDS)
            waited.append(True)

    def run(self, weights, number):
        raise BrokenError

    monkeypatch.setattr(host._Set, "run", run)
    with machine.busy():
        average.update()
        machine.copied = Second
        average.update()
    threading.Timer(0.2, second.set).start()
    average._core.store.updates.settle()
    assert waited


def test_a_copy_that_fails_leaves_the_average_as_it_is(machine, here):
    model, average, twin, right = pair(here, zoo.mlp, polyak.Exponential(0.9))

    def fail(*_):
        raise BrokenError("no way")

    machine.copied = fail
    drift(model, twin, seed=0)
    with pytest.raises(BrokenError, match="no way"):
        average.update()
    machine.copied = None
    average.update(), right.update()
    assert average.num_updates == 1
    assert zoo.bit_equal(average.weights(), right.weights())


@pytest.mark.protects
def test_a_copy_of_which_no_worker_knows_is_waited_for(machine, here, monkeypatch):
    """As after Ctrl-C in update(): a swap that follows keeps the weights where it was copied to."""
    _, average, *_ = pair(here, zoo.mlp, polyak.Exponential(0.9))

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(host.Worker, "start", fail)
        machine.copied = Held
        machine.gate.clear()
        threading.Timer(0.2, machine.gate.set).start()
        with pytest.raises(KeyboardInterrupt):
            average.update()
        assert machine.gate.is_set()
