"""How sources come to the host: layouts, and the order of streams, with what stands for an accelerator."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from polyak.store.updates import transfer
from polyak.store.updates.transfer import PlainCopies, SideStreams, _Lane, pack, transfer_for


class Accelerator:
    """The part of torch.cuda that is used, which writes down what it is asked for."""

    def __init__(self):
        self.log = []
        self.on = None
        self.training = self.current = self.Stream(name="training")

    def Stream(self, device=None, name="side"):  # noqa: N802
        return Stream(self, name)

    def Event(self):  # noqa: N802
        return Event(self)

    def current_stream(self, device):
        return self.current

    @contextlib.contextmanager
    def device(self, device):
        before, self.on = self.on, device
        yield
        self.on = before

    @contextlib.contextmanager
    def stream(self, stream):
        assert self.on is not None
        before, self.current = self.current, stream
        yield
        self.current = before


class Stream:
    def __init__(self, accelerator, name):
        self.accelerator = accelerator
        self.name = name

    def wait_stream(self, other):
        self.accelerator.log.append(f"{self.name} waits for {other.name}")

    def synchronize(self):
        self.accelerator.log.append(f"the host waits for {self.name}")

    def wait_event(self, event):
        self.accelerator.log.append(f"{self.name} waits for event {event.number}")


class Event:
    number = None
    is_over = False

    def __init__(self, accelerator):
        self.accelerator = accelerator

    def record(self, stream):
        self.number = sum("records" in line for line in self.accelerator.log)
        self.accelerator.log.append(f"{stream.name} records {self.number}")

    def query(self):
        return self.is_over

    def synchronize(self):
        assert self.accelerator.on == torch.device("cpu")
        self.accelerator.log.append(f"the host waits for event {self.number}")


class Copying(TorchDispatchMode):
    """Writes down on which stream tensors are copied."""

    def __init__(self, accelerator):
        super().__init__()
        self.accelerator = accelerator

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if "copy_" in str(function):
            self.accelerator.log.append(f"{self.accelerator.current.name} copies")
        return function(*arguments, **options or {})


@pytest.fixture
def accelerator(monkeypatch):
    accelerator = Accelerator()
    monkeypatch.setattr(torch, "get_device_module", lambda device: accelerator)
    monkeypatch.setattr(transfer, "_pinned", lambda size: torch.empty(size, dtype=torch.uint8))
    return accelerator


LARGE = 1 << 20


def sources():
    torch.manual_seed(0)
    return {
        "large": torch.randn(LARGE // 4),
        "transposed": torch.randn(512, 1024).t(),
        "half": torch.randn(3, 1 << 19).bfloat16(),
        "channels last": torch.randn(8, 64, 32, 32).to(memory_format=torch.channels_last),
        "with gaps": torch.randn(1024, 1024)[:, ::2],
        "large buffer": torch.randn(LARGE),
        "conjugate": torch.randn(LARGE, dtype=torch.complex64).conj(),
        "small": torch.randn(3, 5),
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
    }


PARAMETERS = {"large", "transposed", "half", "channels last", "with gaps", "conjugate", "small", "scalar"}
DIRECT = ["large", "transposed", "half", "channels last"]


def assert_staged(tensors, given):
    assert tensors.keys() == given.keys()
    for name, source in given.items():
        staged = tensors[name]
        assert torch.equal(staged, source), name
        assert (staged.dtype, staged.stride()) == (source.dtype, torch.empty_like(source).stride()), name
        assert staged.data_ptr() % 64 == 0
        assert not staged.is_conj()


def test_plain_copies_lie_as_averages_do():
    given = sources()
    staging = PlainCopies(given).make_set()
    staging.start().wait()
    assert_staged(staging.tensors, given)
    assert staging.num_bytes >= sum(tensor.numel() * tensor.element_size() for tensor in given.values())


def test_what_comes_from_an_accelerator_lies_as_averages_do(accelerator):
    given = sources()
    lane = _Lane(torch.device("cpu"), given, PARAMETERS)
    assert list(lane._direct) == DIRECT
    rooms = [lane.make_room() for _ in range(2)]
    for change in (0, 1):
        for tensor in given.values():
            if tensor.is_floating_point():
                tensor.add_(change)
        for room in rooms:
            room.start()
            assert_staged(room.tensors, given)
    assert len({room.tensors["large"].data_ptr() for room in rooms}) == 2


@pytest.mark.protects
def test_copies_are_in_order_with_the_training(accelerator):
    given = {name: tensor for name, tensor in sources().items() if name in ("large", "with gaps")}
    lane = _Lane(torch.device("cpu"), given, PARAMETERS)
    room = lane.make_room()
    with Copying(accelerator):
        for _ in range(2):
            accelerator.log.clear()
            event = room.start()
            event.event.number = 0
    # The scratch memory on the device is free, what is small is put together, the rest is beside the training.
    assert accelerator.log == [
        "training waits for event 0",
        "training copies",
        "side waits for training",
        "side copies",
        "side copies",
        "side records 0",
    ]
    accelerator.log.clear()
    copied = transfer._Events([event])
    copied.hold()
    copied.wait()
    assert accelerator.log == ["training waits for event 0", "the host waits for event 0"]
    assert not copied.is_made()
    event.event.is_over = True
    assert copied.is_made()


def test_copies_of_which_not_all_were_begun_are_waited_for(accelerator, monkeypatch):
    """As after Ctrl-C: what they are copied to is free when this has raised."""
    moved = {"large": torch.zeros(LARGE)}
    way = SideStreams({}, {"large"})
    way._lanes = [_Lane(torch.device("cpu"), moved, {"large"})]
    staging = way.make_set()

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Event, "record", fail)
    with pytest.raises(KeyboardInterrupt):
        staging.start()
    assert accelerator.log[-1] == "the host waits for side"


def test_a_captured_step_waits_for_nothing_outside(accelerator, monkeypatch):
    room = _Lane(torch.device("cpu"), {"large": torch.zeros(LARGE)}, {"large"}).make_room()
    copied = transfer._Events([room.start()])
    monkeypatch.setattr(transfer, "is_capturing", lambda: True)
    accelerator.log.clear()
    copied.hold()
    assert accelerator.log == []


def test_sources_that_are_on_the_host_already_are_copied_at_once(accelerator):
    given = sources()
    staging = SideStreams(given, PARAMETERS).make_set()
    staging.start().wait()
    assert_staged(staging.tensors, given)
    assert accelerator.log == []


def test_only_averages_on_the_host_of_sources_elsewhere_need_it(accelerator, monkeypatch):
    here, there = torch.zeros(2), torch.zeros(2, device="meta")
    assert transfer_for({"x": here}, {"x": here}, {"x"}) is None
    assert transfer_for({"x": there}, {"x": there}, {"x"}) is None
    assert transfer_for({"x": there, "y": here}, {"x": here, "y": here}, {"x"}) is None
    assert transfer_for({"x": there}, {}, {"x"}) is None
    monkeypatch.delattr(Accelerator, "Stream")
    assert isinstance(transfer_for({"x": there, "y": here}, {"x": here}, {"x"}), PlainCopies)


def test_buffers_are_few_and_tensors_in_them_aligned():
    tensors = {str(size): torch.empty(size) for size in (5, 100, 0, 17, 3000, 1)}
    buffers = pack(tensors, limit=1024)
    assert [name for buffer in buffers for name in buffer.offsets] == list(tensors)
    assert [list(buffer.offsets) for buffer in buffers] == [["5", "100", "0", "17"], ["3000"], ["1"]]
    assert all(offset % 64 == 0 for buffer in buffers for offset in buffer.offsets.values())
    assert pack({}) == []
