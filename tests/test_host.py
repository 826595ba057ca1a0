"""Averages on the host, updated by a worker: exact, in order, and never torn, whatever is late."""

import copy
import gc
import io
import os
import pickle
import random
import subprocess
import sys
import textwrap
import threading
import time
import weakref

import pytest
import torch
from torch import nn

import polyak
import test_table
import zoo
from host_cases import MODES, PROFILES, SECONDS, Held, Machine, Slow, weights
from polyak.store import host, local, transfer
from test_memory import peak_memory

pytestmark = pytest.mark.filterwarnings("ignore:the average is .* after 0 updates")


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(local, "transfer_for", machine.transfer_for)
    yield machine
    machine.gate.set()


@pytest.fixture
def here(monkeypatch):
    """Makes averages that are updated where their model is."""

    def make(*arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(local, "transfer_for", transfer.transfer_for)
            average = polyak.WeightAverage(*arguments, **options)
        # So that none is made later, when tensors are replaced.
        average._core.store.lent = True
        return average

    return make


def pair(here, make=zoo.batchnorm, profile=PROFILES, **options):
    """A model with an average that a worker updates, and a twin with the one that it must equal."""
    torch.manual_seed(0)
    model = make()
    twin = copy.deepcopy(model)
    average = polyak.WeightAverage(model, profile, device="cpu", **options)
    assert average._core.store.num_staging_bytes > 0
    right = here(twin, profile, **options)
    assert right._core.store.num_staging_bytes == 0
    return model, average, twin, right


def drift(*models, seed):
    for model in models:
        zoo.drift(model, torch.Generator().manual_seed(seed))


def assert_same(one, other):
    assert zoo.bit_equal(weights(one), weights(other))
    first, second = (each.state_dict() for each in (one, other))
    assert (first["clock"], first["pending"]) == (second["clock"], second["pending"])
    for kind in ("averages", "seconds"):
        for key, by_profile in first.get(kind, {}).items():
            for name, tensors in by_profile.items():
                assert zoo.bit_equal(tensors, second[kind][key][name]), (kind, name)


# Exactness.


@pytest.mark.protects
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("name", zoo.MODELS)
def test_the_bits_of_an_average_beside_the_model(machine, here, name, mode):
    model, average, twin, right = pair(here, zoo.MODELS[name], every=2, start=1, **mode)
    for step in range(7):
        drift(model, twin, seed=step)
        average.update(), right.update()
        average.wait()
    assert average.num_updates == 3
    assert_same(average, right)


@pytest.mark.filterwarnings("ignore:.*_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("operation", test_table.OPERATIONS, ids=lambda operation: operation.__name__)
@pytest.mark.parametrize("model", test_table.MODELS)
def test_every_model_through_every_operation(machine, monkeypatch, model, operation, tmp_path):
    """The table of all models, where each update has to be made, as on several ranks."""
    monkeypatch.setattr(host, "is_alone", lambda: False)
    test_table.test_every_model_under_every_wrapper_through_every_operation(model, "bare", operation, tmp_path)
    assert machine.sets


@pytest.mark.protects
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_what_a_busy_host_leaves_out_is_in_the_next_update(machine, here, mode):
    model, average, twin, right = pair(here, **mode)
    chance = random.Random(0).random
    machine.copied = Slow
    accepted = 0
    for step in range(1, 41):
        drift(model, twin, seed=step)
        if chance() < 0.3:
            machine.gate.clear()
        elif chance() < 0.6:
            machine.gate.set()
            if chance() < 0.5:
                average.wait()
        before = average._core.clock.num_updates
        average.update(at=step)
        if average._core.clock.num_updates > before:
            accepted += 1
            right.update(at=step)
    machine.gate.set()
    assert average.num_updates == right.num_updates == accepted
    assert 10 < accepted < 35
    assert average.report().num_skipped == 40 - accepted
    assert "skipped: not finite, or the host was busy" in str(average.report())
    assert zoo.bit_equal(weights(average), weights(right))
    drift(model, twin, seed=0)
    average.update(at=41), right.update(at=41)
    assert zoo.bit_equal(weights(average), weights(right))


def test_there_are_two_sets_and_never_more(machine, here):
    model, average, twin, right = pair(here, zoo.mlp, polyak.Exponential(0.9))
    with machine.busy():
        for step in range(6):
            drift(model, twin, seed=step)
            average.update()
            if step < 2:
                right.update()
    assert len(machine.sets) == 2
    assert average.num_updates == 2
    assert average.report().num_skipped == 4
    assert zoo.bit_equal(average.weights(), right.weights())


@pytest.mark.protects
def test_updates_do_not_wait_and_take_no_memory(machine, here):
    model, average, *_ = pair(here, lambda: nn.Linear(1000, 1000), polyak.Exponential(0.9))
    size = sum(4 * parameter.numel() for parameter in model.parameters())
    assert 2 * size <= average.report().num_staging_bytes <= 2 * (size + 200)
    assert average.report().num_bytes == size
    with machine.busy(), peak_memory() as peak:
        started = time.monotonic()
        for _ in range(20):
            average.update()
        assert time.monotonic() - started < SECONDS / 2
    assert peak.bytes < size / 10


@pytest.mark.protects
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_wait_waits(machine, here, nonfinite):
    model, average, twin, right = pair(here, nonfinite=nonfinite)
    drift(model, twin, seed=0)
    machine.open_soon()
    average.update(), right.update()
    average.wait()
    assert machine.gate.is_set()
    stored = average._core.store.averages
    assert zoo.bit_equal(stored["long"], right._core.store.averages["long"])


def swapped_in(average):
    with average["short"].swapped():
        return zoo.clone(average._core.source.bare.state_dict())


def exported(average, tmp_path):
    average["short"].export(tmp_path / "file.safetensors")
    return polyak.read(tmp_path / "file.safetensors").average


def state(average):
    kept = average.state_dict()
    return {**next(iter(kept["averages"].values()))["long"], **next(iter(kept["copies"].values()))}


def copied_to(average):
    model = zoo.batchnorm()
    average["long"].copy_to(model)
    return model.state_dict()


READERS = {
    "weights": lambda average, _: average["long"].weights(),
    "state_dict": lambda average, _: state(average),
    "export": exported,
    "swapped": lambda average, _: swapped_in(average),
    "module": lambda average, _: average["short"].module().state_dict(),
    "copy_to": lambda average, _: copied_to(average),
    "deepcopy": lambda average, _: copy.deepcopy(average)["long"].weights(),
    "pickle": lambda average, _: pickle.loads(pickle.dumps(average))["long"].weights(),
    "report": lambda average, _: {a.name: torch.tensor(a.distance) for a in average.report().averages},
    "reset": lambda average, _: average.reset() or average["long"].weights(),
    "load_state_dict": lambda average, _: average.load_state_dict(OTHER) or average["long"].weights(),
    "adapt": lambda average, _: average.adapt() or average["long"].weights(),
    "live_module": lambda average, _: average["short"].live_module().state_dict(),
}
OTHER = {}


@pytest.mark.protects
@pytest.mark.parametrize("reader", READERS)
def test_reading_waits(machine, here, reader, tmp_path):
    model, average, twin, right = pair(here)
    drift(model, twin, seed=0)
    average.update(), right.update()
    OTHER.update(copy.deepcopy(right.state_dict()))
    drift(model, twin, seed=1)
    machine.open_soon()
    average.update(), right.update()
    drift(model, twin, seed=2)
    found = zoo.clone(READERS[reader](average, tmp_path))
    assert zoo.bit_equal(found, zoo.clone(READERS[reader](right, tmp_path)))
    drift(model, twin, seed=3)
    machine.copied = None
    average.update(), right.update()
    assert zoo.bit_equal(weights(average), weights(right))


@pytest.mark.protects
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_going_on_from_a_state_is_the_same_bit_for_bit(machine, here, mode):
    model, average, twin, right = pair(here, **mode)
    for step in range(3):
        drift(model, twin, seed=step)
        average.update(), right.update()
        average.wait()
    file = io.BytesIO()
    torch.save(average.state_dict(), file)
    file.seek(0)
    other_model = copy.deepcopy(model)
    other = polyak.WeightAverage(other_model, PROFILES, device="cpu", **mode)
    other.load_state_dict(torch.load(file, weights_only=True))
    for step in range(3, 6):
        drift(model, twin, other_model, seed=step)
        average.update(), right.update(), other.update()
        average.wait(), other.wait()
    assert_same(average, right)
    assert_same(other, right)


def test_a_swap_keeps_the_weights_in_staging_memory(machine, here):
    model, average, twin, right = pair(here, lambda: nn.Linear(1000, 1000).half(), polyak.Exponential(0.9))
    size = sum(2 * parameter.numel() for parameter in model.parameters())
    drift(model, twin, seed=0)
    average.update(), right.update()
    average.wait()
    raw = zoo.clone(model.state_dict())
    with peak_memory() as peak, average.swapped():
        assert zoo.bit_equal(average.raw_weights(), raw)
    assert peak.bytes < size * 2  # of raw_weights() alone
    assert zoo.bit_equal(dict(model.state_dict()), raw)
    with average.swapped(), right.swapped():
        assert zoo.bit_equal(dict(model.state_dict()), dict(twin.state_dict()))
    drift(model, twin, seed=1)
    average.update(), right.update()
    assert zoo.bit_equal(average.weights(), right.weights())


def test_a_module_that_shares_the_averages_is_never_torn(machine, here):
    model, average, twin, right = pair(here)
    live = average["long"].live_module()
    for step in range(3):
        drift(model, twin, seed=step)
        machine.open_soon()
        average.update(), right.update()
        assert zoo.bit_equal(dict(live.state_dict()), right["long"].weights())


def test_the_classic_class_has_no_worker(machine):
    model = zoo.mlp()
    average = polyak.ModelEma(model, decay=0.5, device="cpu")
    assert average._store.num_staging_bytes == 0
    assert not machine.sets


def test_tensors_that_are_replaced_are_staged_anew(machine, here):
    model, average, twin, right = pair(here)
    with torch.no_grad():
        for each in (model, twin):
            each[0].weight = nn.Parameter(each[0].weight.clone())
    for step in range(3):
        drift(model, twin, seed=step)
        average.update(), right.update()
        average.wait()
    assert_same(average, right)
    assert len(machine.sets) == 4
    assert average.plan is average._core.store._host.plan


def test_where_there_was_no_memory_to_stage_replaced_tensors_the_next_update_tries_again(machine, here, monkeypatch):
    model, average, twin, right = pair(here, zoo.mlp, polyak.Exponential(0.9))
    drift(model, twin, seed=0)
    average.update(), right.update()
    for each in (model, twin):
        each[0].weight = nn.Parameter(each[0].weight.detach().clone())

    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(local, "transfer_for", fail)
        with pytest.raises(MemoryError):
            average.update()
    drift(model, twin, seed=1)
    average.update(at=None), right.update()
    assert_same(average, right)


@pytest.mark.protects
@pytest.mark.parametrize("read", ["tensors", "swap_in", "again", "pickle"])
def test_a_store_by_itself_is_not_read_while_it_is_written(machine, here, read):
    model, average, twin, right = pair(here, profile=polyak.Exponential(0.9))
    drift(model, twin, seed=0)
    machine.open_soon()
    average.update(), right.update()
    store, entries = average._core.store, average._core.source.entries
    if read == "tensors":
        found = store.tensors("average")
    elif read == "swap_in":
        store.swap_in(store.make_swap("average", buffers=[], aside=False))
        found = store.tensors("average")
    elif read == "again":
        found = store.again(entries).averages["average"]
    else:
        found = pickle.loads(pickle.dumps(store)).averages["average"]
    expected = right._core.store.averages["average"]
    assert zoo.bit_equal({name: found[name].clone() for name in expected}, expected)
    store.swap_out()


# The training waits for a copy where it would write into it, and nowhere else.


@pytest.mark.protects
def test_an_optimizer_waits_until_the_weights_are_copied(machine, here):
    model, average, twin, right = pair(here, zoo.mlp, polyak.Exponential(0.9))
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, twin)]
    for _ in range(3):
        for each, optimizer in zip((model, twin), optimizers, strict=True):
            each(torch.ones(2, 6)).square().mean().backward()
            machine.gate.set()
            optimizer.step()
            optimizer.zero_grad()
        machine.copied = Held
        machine.gate.clear()
        average.update(), right.update()
        # The copy begins in a moment; the step that comes next must wait for it.
        threading.Timer(0.1, machine.gate.set).start()
        for each, optimizer in zip((model, twin), optimizers, strict=True):
            each(torch.ones(2, 6)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        average.wait()
        machine.copied = None
        average.update(), right.update()
        average.wait()
    assert len(machine.holds) >= 3
    assert zoo.bit_equal(average.weights(), right.weights())


def test_optimizers_are_left_alone_when_the_average_is_gone(machine, here):
    from torch.optim.optimizer import _global_optimizer_pre_hooks as hooks

    model, average, *_ = pair(here, zoo.mlp, polyak.Exponential(0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = len(hooks)
    machine.copied = Held
    for _ in range(3):
        made = polyak.WeightAverage(model, device="cpu")
    optimizer.step()
    assert len(machine.holds) == 1
    assert len(hooks) == before
    del made
    gc.collect()
    optimizer.step()
    assert len(machine.holds) == 1
    assert average


def test_an_average_may_be_collected_within_an_optimizer_step(machine, here, monkeypatch):
    """Torch goes through its hooks there, and raises where one of them is removed."""
    model, average, *_ = pair(here, zoo.mlp, polyak.Exponential(0.9))
    gone = [polyak.WeightAverage(model, device="cpu")]
    ended = weakref.ref(gone[0]._core.store)
    hold = host.Host.hold

    def collecting(self):
        gone.clear()
        gc.collect()
        hold(self)

    monkeypatch.setattr(host.Host, "hold", collecting)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert ended() is None
    assert average


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
    average._core.store.settle()
    with pytest.raises(polyak.StateError, match=r"held at an earlier update NaNs or infinities in '0\.weight'"):
        getattr(average, through)()
    model.load_state_dict(kept)
    average.wait()
    drift(model, twin, seed=0)
    average.update(), right.update(at=2)
    assert average.num_updates == 1
    assert zoo.bit_equal(average.weights(), right.weights())


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
            average._core.store.settle()

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
    average._core.store.settle()
    assert runs == [1]


@pytest.mark.protects
def test_what_is_left_out_after_an_error_waits_for_its_copy(machine, here, monkeypatch):
    """Its staging memory is free then: a swap may keep the weights in it."""
    _, average, *_ = pair(here, zoo.mlp, polyak.Exponential(0.9))
    second, waited = threading.Event(), []

    class Second:
        def __init__(self, make, gate, holds):
            pass

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
    average._core.store.settle()
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


# The end of a thread and of a process.


def test_the_worker_ends_with_the_average(machine, here):
    before = set(threading.enumerate())
    _, average, *_ = pair(here, zoo.mlp, polyak.Exponential(0.9))
    average.update()
    (thread,) = set(threading.enumerate()) - before
    store = weakref.ref(average._core.store)
    with machine.busy():
        average.update()
        del average
        gc.collect()
        assert store() is None
        assert thread.is_alive()
    thread.join(SECONDS)
    assert not thread.is_alive()


def test_a_process_ends_with_work_under_way():
    code = """
        import sys, time, torch, polyak
        from host_cases import Machine
        from polyak.store import local
        machine = Machine()
        local.transfer_for = machine.transfer_for
        model = torch.nn.Linear(2000, 2000)
        average = polyak.WeightAverage(model, polyak.Exponential(0.5), device="cpu")
        for _ in range(5):
            average.update()
        machine.open_soon()
        average.update()
        average.update()
        print("done")
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


@pytest.mark.protects
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_forked_process_has_a_whole_average_and_goes_on(machine, here):
    model, average, twin, right = pair(here, zoo.mlp, polyak.Exponential(0.9))
    drift(model, twin, seed=0)
    machine.open_soon()
    average.update(), right.update()
    child = os.fork()
    if child == 0:
        try:
            same = zoo.bit_equal(average.weights(), right.weights())
            drift(model, twin, seed=1)
            machine.copied = None
            average.update(), right.update()
            same = same and zoo.bit_equal(average.weights(), right.weights())
            os._exit(0 if same else 1)
        except BaseException:
            os._exit(2)
    assert status_of(child) == 0
    assert zoo.bit_equal(average.weights(), right.weights())


def status_of(child):
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.01)
    os.kill(child, 9)
    return "it hangs"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_optimizers_of_a_forked_process_do_not_ask_for_the_accelerator(machine, here):
    model, average, *_ = pair(here, zoo.mlp, polyak.Exponential(0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    machine.copied = Held
    average.update()
    average.wait()
    child = os.fork()
    if child == 0:
        optimizer.step()
        os._exit(len(machine.holds))
    assert status_of(child) == 0
    optimizer.step()
    assert len(machine.holds) == 1


# What it says of itself.


def test_the_plan_says_where_the_average_is(machine, here):
    _, average, _, right = pair(here, zoo.mlp, polyak.Exponential(0.9))
    first, *others = str(average.plan).splitlines()
    count = average.report().num_staging_bytes
    assert first == f"host-resident, by a worker, through {count} bytes of staging memory"
    assert others == str(right.plan).splitlines()
    assert f" bytes and {count:,} of staging memory on the host" in str(average.report())
    assert "staging" not in str(right.report())


def test_it_cannot_be_captured(machine, here, monkeypatch):
    _, average, *_ = pair(here, zoo.mlp, polyak.Exponential(0.9))
    with pytest.raises(polyak.StateError, match="averages on the host cannot be updated in a CUDA graph"):
        average.advance()
    monkeypatch.setattr(polyak.core, "is_capturing", lambda: True)
    with pytest.raises(polyak.StateError, match=r"call update\(\) after each replay\(\), and wait\(\) before the next"):
        average.update()


def test_nothing_of_it_where_model_and_average_are_in_one_place():
    average = polyak.WeightAverage(zoo.mlp(), device="cpu")
    assert average.report().num_staging_bytes == 0
    average.update()
    average.wait()


def test_the_number_of_updates_waits_for_nobody_where_it_is_known(machine, here):
    _, average, *_ = pair(here, zoo.mlp, polyak.Exponential(0.9))
    with machine.busy():
        average.update()
        assert average.num_updates == 1
        assert not machine.gate.is_set()
