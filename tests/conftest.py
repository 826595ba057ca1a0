"""What several files of tests are given.

An installation without the C kernel says so once, which is right, and here it would be an error.
"""

import warnings

import pytest

import polyak
from host_cases import Machine
from polyak.kernels import native
from polyak.store import store as local
from polyak.store.updates import transfer

# What writes the files there needs libraries that tests do not.
collect_ignore_glob = ["data/*"]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    native.library()


@pytest.fixture
def machine(monkeypatch):
    """Averages that are given a device are updated there by a worker, as beside an accelerator."""
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
        average._core.store._may_use_worker = False
        return average

    return make
