"""What the host knows of a number on a device, without waiting: with a stand-in for the device and its events."""

import pytest
import torch

from polyak.kernels.gpu import control


class Device:
    """A number that grows, and work that is done in order, when it is told to."""

    def __init__(self, monkeypatch):
        self.number = torch.zeros(1, dtype=torch.int64)
        self._recorded = []
        monkeypatch.setattr(control, "new_event", lambda device: Event(self._recorded))

    def do(self, count):
        """Does the oldest pieces of work."""
        for event in self._recorded[:count]:
            event.under_way -= 1
        del self._recorded[:count]


class Event:
    """Like a CUDA event: over when the device has reached the last record."""

    def __init__(self, recorded):
        self._recorded = recorded
        self.under_way = 0

    def record(self, stream):
        self._recorded.append(self)
        self.under_way += 1

    def query(self):
        return not self.under_way


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


@pytest.mark.protects
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_all_is_known_when_the_device_is_done(steps, device):
    found = control.Seen(device.number)
    for number in range(1, steps + 1):
        device.number.fill_(number)
        found.order()
        assert found.read() == 0
    device.do(steps)
    assert found.read() == steps


@pytest.mark.protects
def test_a_host_that_is_always_ahead_learns_something(device):
    found = control.Seen(device.number)
    known = []
    for number in range(1, 31):
        device.number.fill_(number)
        found.order()
        if number > 3:
            device.do(1)
        known.append(found.read())
    assert known == sorted(known)
    # Each copy that has arrived was ordered three steps before, and the next one was ordered then.
    assert 30 - 7 <= known[-1] < 30


def test_on_a_cpu_all_is_known_at_once():
    number = torch.zeros(1, dtype=torch.int64)
    found = control.Seen(number)
    number.fill_(3)
    found.order()
    assert found.read() == 3
