"""Averages on the host, updated by a worker: exact, in order, and never torn, whatever is late."""

import copy
import io
import pickle
import random
import threading
import time

import pytest
import torch
from torch import nn

import operations
import polyak
import zoo
from host_cases import MODES, PROFILES, SECONDS, Held, Slow, assert_same, drift, pair, weights
from peak import peak_memory
from polyak.kernels import native
from polyak.store import store as local
from polyak.store.updates import host

pytestmark = pytest.mark.filterwarnings("ignore:the average is .* after 0 updates")


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
@pytest.mark.parametrize("operation", operations.OPERATIONS, ids=lambda operation: operation.__name__)
@pytest.mark.parametrize("model", operations.MODELS)
def test_every_model_through_every_operation(machine, monkeypatch, model, operation, tmp_path):
    """The table of all models, where each update has to be made, as on several ranks."""
    monkeypatch.setattr(host, "is_alone", lambda: False)
    operations.check(model, "bare", operation, tmp_path)
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
        before = average._core.num_updates
        average.update(at=step)
        if average._core.num_updates > before:
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
def test_where_the_accelerator_is_behind_every_update_is_made(machine, here):
    """As where Python launches steps that are far from being computed; the host has time enough for all of them."""
    model, average, twin, right = pair(here, zoo.mlp, polyak.Exponential(0.9))
    machine.copied = Held
    for step in range(3):
        machine.gate.clear()
        for _ in range(2):
            average.update(), right.update()
        assert not machine.gate.is_set()
        threading.Timer(0.1, machine.gate.set).start()
        average.update(), right.update()
        assert machine.gate.is_set()
        average.wait()
        drift(model, twin, seed=step)
    assert average.num_updates == 9
    assert len(machine.sets) == 2
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


@pytest.mark.skipif(native.library() is None, reason="without C the check of a swap takes as much scratch memory")
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
    assert average.plan is average._core.store.updates.plan


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
    monkeypatch.setattr(polyak.average.core, "is_capturing", lambda: True)
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
