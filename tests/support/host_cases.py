"""Averages that a worker updates, on machines without an accelerator: the same engine, with plain copies."""

import contextlib
import copy
import threading

import torch

import polyak
import zoo
from polyak.store.updates.transfer import PlainCopies, Staging

PROFILES = {"short": polyak.Exponential(0.9), "long": polyak.Power(relative_std=0.1)}
MODES = [{}, {"compensated": True}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}, {"dtype": torch.float64}]
SECONDS = 20  # until a test that hangs fails


def weights(average):
    """All averages by profile and name, on the host."""
    return {f"{name}/{key}": t.cpu() for name in average.profiles for key, t in average[name].weights().items()}


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


class Held:
    """A copy that is made by a thread, after the gate was opened."""

    def __init__(self, make, gate, holds):
        self._done = threading.Event()
        self._holds = holds

        def run():
            assert gate.wait(SECONDS)
            make()
            self._done.set()

        threading.Thread(target=run).start()

    def is_made(self):
        return self._done.is_set()

    def wait(self):
        assert self._done.wait(SECONDS)

    def hold(self):
        self._holds.append(self)
        self.wait()


class Slow:
    """A copy that was made at once, whose worker waits for the gate."""

    def __init__(self, make, gate, holds):
        make()
        self._gate = gate

    def is_made(self):
        return True

    def wait(self):
        assert self._gate.wait(SECONDS)

    def hold(self):
        pass


class Machine:
    """What stands for an accelerator.

    Attributes:
        copied: Slow or Held; None for copies without delay.
        gate: what they wait for.
        holds: the copies that an optimizer has waited for.
        sets: the staging sets that were made.
    """

    def __init__(self):
        self.copied = None
        self.gate = threading.Event()
        self.gate.set()
        self.holds = []
        self.sets = []

    def transfer_for(self, sources, averages, parameters):
        return Transfer(self, sources)

    @contextlib.contextmanager
    def busy(self):
        """The worker stands still inside."""
        self.gate.clear()
        before, self.copied = self.copied, Slow
        try:
            yield
        finally:
            self.gate.set()
            self.copied = before

    def open_soon(self):
        """The gate is shut, and opens by itself while somebody waits."""
        self.gate.clear()
        self.copied = Slow
        timer = threading.Timer(0.2, self.gate.set)
        timer.start()


class Transfer:
    def __init__(self, machine, sources):
        self._machine = machine
        self._copies = PlainCopies(sources)

    def make_set(self):
        staging = self._copies.make_set()
        machine = self._machine

        def start():
            if machine.copied is None:
                return staging.start()
            return machine.copied(staging.start, machine.gate, machine.holds)

        machine.sets.append(staging)
        return Staging(staging.tensors, staging.num_bytes, start)
