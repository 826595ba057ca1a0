"""What an average on the host waits for and what waits for it: optimizers, threads that end, and forked processes."""

import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
import weakref

import pytest
import torch

import polyak
import zoo
from host_cases import SECONDS, Held, drift, pair
from polyak.store.updates import host

pytestmark = pytest.mark.filterwarnings("ignore:the average is .* after 0 updates")


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
    hold = host.OnHost.hold

    def collecting(self):
        gone.clear()
        gc.collect()
        hold(self)

    monkeypatch.setattr(host.OnHost, "hold", collecting)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert ended() is None
    assert average


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
        from polyak.store import store as local
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
    command = [sys.executable, "-W", "ignore:polyak has no C kernel:UserWarning", "-c", textwrap.dedent(code)]
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
