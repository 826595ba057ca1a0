"""What only a GPU can show of averages on the host: streams, pinned memory, and that nothing waits."""

import copy

import pytest
import torch
from torch import nn

import polyak
import zoo
from host_cases import MODES, PROFILES, weights
from polyak.store import store as local
from polyak.store.updates.transfer import SideStreams, transfer_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that CUDA can use"),
    pytest.mark.filterwarnings("ignore:the average is .* after 0 updates"),
]


def pair(make, profile=PROFILES, **options):
    """A model on the GPU with its average on the host, and the same model and average on the CPU."""
    torch.manual_seed(0)
    twin = make()
    model = copy.deepcopy(twin).cuda()
    average = polyak.WeightAverage(model, profile, device="cpu", **options)
    assert "host-resident" in str(average.plan)
    return model, average, twin, polyak.WeightAverage(twin, profile, **options)


@torch.no_grad()
def drift(model, twin, seed):
    zoo.drift(twin, torch.Generator().manual_seed(seed))
    for name, tensor in model.state_dict().items():
        tensor.copy_(twin.state_dict()[name])


class Large(nn.Module):
    """Tensors that are copied one by one, and some that are put together before."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1500, 1500), nn.BatchNorm1d(1500), nn.Linear(1500, 1500).bfloat16())
        self.transposed = nn.Parameter(torch.randn(900, 1100).t())
        self.with_gaps = nn.Parameter(torch.randn(800, 1600)[:, ::2])
        self.register_buffer("table", torch.arange(500_000))


@pytest.mark.protects
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("name", [*zoo.MODELS, "large"])
def test_the_bits_are_those_of_the_same_model_on_the_cpu(name, mode):
    model, average, twin, right = pair({**zoo.MODELS, "large": Large}[name], every=2, **mode)
    for step in range(6):
        drift(model, twin, step)
        average.update(), right.update()
        average.wait()
    assert average.num_updates == right.num_updates == 3
    assert zoo.bit_equal(weights(average), weights(right))


@pytest.mark.protects
def test_what_is_staged_is_pinned_and_copied_beside_the_training():
    _, average, *_ = pair(Large)
    host = average._core.store.updates
    assert all(tensor.is_pinned() for each in host._sets for tensor in each.staging.tensors.values() if tensor.numel())


@pytest.mark.protects
def test_an_optimizer_waits_for_the_copy_on_the_device(monkeypatch):
    """Copies that are late, because the stream is kept busy, have the weights of before the next step."""
    made = []
    monkeypatch.setattr(local, "transfer_for", lambda *about: made.append(transfer_for(*about)) or made[-1])
    model = nn.Linear(3000, 3000, bias=False).cuda()
    average = polyak.WeightAverage(model, polyak.Uniform(), device="cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    host = average._core.store.updates
    (lane,) = made[-1]._lanes
    for _ in range(3):
        model.weight.grad = torch.randn_like(model.weight)
        with torch.cuda.stream(lane._stream):
            torch.cuda._sleep(200_000_000)
        before = model.weight.detach().clone()
        average.update()
        optimizer.step()
        average.wait()
        assert any(torch.equal(each.staging.tensors["weight"], before.cpu()) for each in host._sets)
        assert not torch.equal(model.weight, before)


@pytest.mark.protects
def test_updates_of_steps_in_a_row_are_exact_without_waiting():
    """Weights, and the statistics that the next forward pass changes, are those of the moment of the update."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1200, 1200), nn.BatchNorm1d(1200), nn.Linear(1200, 1200)).cuda()
    twin = copy.deepcopy(model)
    average = polyak.WeightAverage(model, polyak.Exponential(0.9), device="cpu")
    right = polyak.WeightAverage(twin, polyak.Exponential(0.9))
    optimizers = [torch.optim.AdamW(each.parameters(), fused=True) for each in (model, twin)]
    generator = torch.Generator(device="cuda").manual_seed(0)
    for step in range(1, 30):
        inputs = torch.randn(256, 1200, device="cuda", generator=generator)
        for each, optimizer in zip((model, twin), optimizers, strict=True):
            each(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        before = average._core.num_updates
        average.update(at=step)
        if average._core.num_updates > before:
            right.update(at=step)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert zoo.bit_equal(weights(average), weights(right))


def test_an_update_neither_waits_nor_allocates():
    model, average, *_ = pair(Large)
    for _ in range(2):
        average.update()
        average.wait()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        average.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    average.wait()
    assert model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_swap_takes_no_memory_of_the_gpu(dtype):
    model = nn.Sequential(*(nn.Linear(2000, 2000) for _ in range(4))).to("cuda", dtype)
    average = polyak.WeightAverage(model, device="cpu")
    zoo.bump(model)
    average.update()
    average.wait()
    raw = zoo.clone(model.state_dict())
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with average.swapped():
        assert not zoo.bit_equal(dict(model.state_dict()), raw)
    assert torch.cuda.max_memory_allocated() - before < size
    assert zoo.bit_equal(dict(model.state_dict()), raw)


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_bad_step_is_left_out(nonfinite):
    model, average, twin, right = pair(zoo.mlp, polyak.Exponential(0.9), nonfinite=nonfinite)
    drift(model, twin, 0)
    average.update(), right.update()
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    average.update()
    if nonfinite == "raise":
        with pytest.raises(polyak.StateError, match=r"held at an earlier update NaNs or infinities in '0\.weight'"):
            average.wait()
    assert average.num_updates == 1
    assert zoo.bit_equal(weights(average), weights(right))


def test_side_streams_are_what_a_gpu_has():
    sources = {"x": torch.zeros(3, device="cuda")}
    assert isinstance(transfer_for(sources, {"x": torch.zeros(3)}, {"x"}), SideStreams)
