"""`recalibrate_batchnorm`: statistics of BatchNorm layers for the weights that a model has now."""

import collections
import copy
import sys

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.optim.swa_utils import update_bn

import polyak
from polyak.batchnorm import recalibrate_batchnorm

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def network(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 4, 3)]
    return nn.Sequential(*layers, nn.BatchNorm1d(3, momentum=None, affine=False))


def batches(*sizes, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [3 + 2 * torch.randn(size, 2, 6, 6, generator=generator) for size in sizes]


def statistics(module):
    return {name: buffer.clone() for name, buffer in module.named_buffers() if name.split(".")[-1] in STATISTICS}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def settings(module):
    parts = [(part.training, getattr(part, "momentum", 0)) for part in module.modules()]
    return parts, [parameter.requires_grad for parameter in module.parameters()]


def expected_statistics(layer_inputs):
    """Mean and variance of a layer by the definition, in float64: each batch counts by its values a channel."""
    sizes = [values.transpose(0, 1).flatten(1).shape[1] for values in layer_inputs]
    columns = [values.double().transpose(0, 1).flatten(1) for values in layer_inputs]
    mean = sum(size * each.mean(1) for size, each in zip(sizes, columns, strict=True)) / sum(sizes)
    variance = sum(size * each.var(1) for size, each in zip(sizes, columns, strict=True)) / sum(sizes)
    return mean, variance


def test_equal_batches_give_what_torch_does():
    module, data = network(), batches(5, 5, 5, 5)
    reference = copy.deepcopy(module)
    update_bn(data, reference)
    recalibrate_batchnorm(module, data)
    for name, expected in statistics(reference).items():
        assert torch.allclose(statistics(module)[name], expected, rtol=1e-5, atol=1e-6), name
    assert module[1].num_batches_tracked == 4


def test_a_small_last_batch_counts_for_what_it_is():
    module, data = network(), batches(16, 16, 3)
    recalibrate_batchnorm(module, data)
    twin = copy.deepcopy(module).train()
    inputs = {1: [twin[:1](batch) for batch in data], 5: [twin[:5](batch) for batch in data]}
    for position, layer_inputs in inputs.items():
        mean, variance = expected_statistics(layer_inputs)
        assert torch.allclose(module[position].running_mean.double(), mean, rtol=1e-5, atol=1e-6)
        assert torch.allclose(module[position].running_var.double(), variance, rtol=1e-5)
    # The mean of batches of any sizes is the mean over everything.
    everything = torch.cat(inputs[1]).double().mean((0, 2, 3))
    assert torch.allclose(module[1].running_mean.double(), everything, rtol=1e-5)


def test_many_batches_lose_no_digits():
    module = nn.BatchNorm1d(1)
    value = torch.tensor([[0.1], [0.3]])
    recalibrate_batchnorm(module, [value])
    once = statistics(module)
    recalibrate_batchnorm(module, [value] * 3000)
    assert torch.equal(module.running_mean, once["running_mean"])
    assert torch.equal(module.running_var, once["running_var"])
    assert module.num_batches_tracked == 3000


def test_statistics_of_before_have_no_part_in_it():
    module, data = network(), batches(4, 4)
    other = copy.deepcopy(module)
    module[1].running_mean.fill_(float("nan"))
    module[1].running_var.fill_(float("inf"))
    for each in (module, other):
        recalibrate_batchnorm(each, data)
    assert same(statistics(module), statistics(other))


def test_modes_and_gradients_are_as_before():
    module, data = network(), batches(4, 4)
    module.eval()
    module[0].train()
    module[0].weight.requires_grad_(False)
    before = settings(module)
    recalibrate_batchnorm(module, data)
    assert settings(module) == before
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


class Interrupted(BaseException):
    pass


def failing(data, error):
    yield from data
    raise error


@pytest.mark.parametrize("error", [ValueError("no disk"), KeyboardInterrupt(), Interrupted()])
@pytest.mark.parametrize("where", ["loader", "forward"])
def test_everything_is_as_before_when_something_is_raised(where, error):
    module, data = network().eval(), batches(4, 4)
    module[1].train()
    before, statistics_before = settings(module), statistics(module)

    def forward(module, batch):
        module(batch)
        if where == "forward":
            raise error

    with pytest.raises(type(error)):
        recalibrate_batchnorm(module, failing(data, error), forward=forward)
    assert settings(module) == before
    assert same(statistics(module), statistics_before)
    assert not any(part._forward_hooks for part in module.modules())


Batch = collections.namedtuple("Batch", ["images", "labels"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda batch: batch,
        lambda batch: [batch, torch.zeros(1)],
        lambda batch: (batch,),
        lambda batch: Batch(batch, None),
        lambda batch: {"input": batch},
        lambda batch: collections.UserDict(input=batch),
    ],
)
def test_batches_of_every_structure(wrap):
    module, data = network(), batches(4, 6)
    expected = copy.deepcopy(module)
    recalibrate_batchnorm(expected, data)
    recalibrate_batchnorm(module, map(wrap, data))
    assert same(statistics(module), statistics(expected))


def test_nested_batches_are_moved_whole():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, pair, *, scale=1):
            first, (second, name) = pair
            assert name == "text"
            return self.norm(first + scale * second["x"])

    module = Two()
    batch = (torch.randn(4, 2), (collections.OrderedDict(x=torch.randn(4, 2)), "text"))
    recalibrate_batchnorm(module, [(batch, "label")])
    assert torch.allclose(module.norm.running_mean, (batch[0] + batch[1][0]["x"]).mean(0))
    expected = statistics(module)
    recalibrate_batchnorm(module, [{"pair": batch, "scale": 1}])
    assert same(statistics(module), expected)


def test_forward_calls_the_module_in_another_way():
    module, data = network(), batches(4, 6)
    expected = copy.deepcopy(module)
    recalibrate_batchnorm(expected, data)
    recalibrate_batchnorm(
        module, [("x", batch) for batch in data], forward=lambda module, batch: module(batch[1]).sum()
    )
    assert same(statistics(module), statistics(expected))


def test_no_batchnorm_runs_nothing():
    for module in (nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False))):
        recalibrate_batchnorm(module, failing([], AssertionError("it ran")))


def test_no_batches_are_an_error():
    module = network()
    before = statistics(module)
    for empty in ([], iter(())):
        with pytest.raises(ValueError, match="batches: there are none, and statistics need at least one; was the iter"):
            recalibrate_batchnorm(module, empty)
    with pytest.raises(ValueError, match=r"batches: \(\) is an empty batch; leave it out"):
        recalibrate_batchnorm(module, [()])
    with pytest.raises(ValueError, match="batches: a batch without samples came to a BatchNorm layer; leave it out"):
        recalibrate_batchnorm(module, batches(4, 0))
    assert same(statistics(module), before)
    assert module.training


def test_what_reaches_no_layer_is_an_error():
    module = network()
    before = statistics(module)
    with pytest.raises(ValueError, match=r"no batch reached any of the 2 BatchNorm layers in training mode: does forw"):
        recalibrate_batchnorm(module, batches(4), forward=lambda module, batch: None)
    with pytest.raises(ValueError, match="no batch reached any"):
        recalibrate_batchnorm(module, batches(4), forward=lambda module, batch: module.eval()(batch))
    assert same(statistics(module), before)


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"module: a torch.nn.Module is needed, not dict"):
        recalibrate_batchnorm({}, [])
    with pytest.raises(polyak.StateError, match="a LazyBatchNorm1d is not initialised yet; run a forward pass first"):
        recalibrate_batchnorm(nn.LazyBatchNorm1d(), [torch.ones(2, 2)])


class FrozenBatchNorm(nn.Module):
    """As torchvision's: statistics, but no momentum to move them by."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.full((4,), 2.0))
        self.register_buffer("running_var", torch.full((4,), 3.0))

    def forward(self, values):
        return values


class Backbone(nn.Module):
    """A layer that stays in eval mode, as detectors keep theirs; one that is never called; one that comes twice."""

    def __init__(self):
        super().__init__()
        self.frozen, self.unused, self.twice = nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.BatchNorm2d(2)

    def train(self, mode=True):
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, images):
        return self.twice(self.twice(self.frozen(images)))


def test_layers_that_take_no_part_keep_their_statistics():
    module, data = Backbone(), batches(4, 4)
    for layer in (module.frozen, module.unused):
        layer.running_mean.fill_(0.5)
        layer.num_batches_tracked.fill_(9)
    before = statistics(module)
    recalibrate_batchnorm(module, data)
    after = statistics(module)
    for name in before:
        assert torch.equal(before[name], after[name]) != name.startswith("twice"), name
    frozen = nn.Sequential(FrozenBatchNorm(), nn.Conv2d(2, 4, 1))
    recalibrate_batchnorm(frozen, failing([], AssertionError("it ran")))
    assert frozen[0].running_mean[0] == 2


def test_a_layer_that_is_called_twice_takes_both():
    module, data = Backbone(), batches(4, 6)
    module.frozen.eps = 0.0
    recalibrate_batchnorm(module, data)
    twin = copy.deepcopy(module.twice).train()
    mean, variance = expected_statistics([each for batch in data for each in (batch, twin(batch).detach())])
    assert torch.allclose(module.twice.running_mean.double(), mean, rtol=1e-5)
    assert torch.allclose(module.twice.running_var.double(), variance, rtol=1e-5)


@pytest.mark.parametrize("make", [nn.SyncBatchNorm, lambda n: nn.InstanceNorm2d(n, track_running_stats=True)])
def test_other_layers_of_the_kind(make):
    module, data = make(2), batches(4, 4)
    recalibrate_batchnorm(module, data)
    assert torch.allclose(module.running_mean, torch.cat(data).mean((0, 2, 3)), rtol=1e-5)
    assert module.num_batches_tracked == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    module, data = network().to(dtype), [batch.to(dtype) for batch in batches(8, 8, 4)]
    recalibrate_batchnorm(module, data)
    mean, _ = expected_statistics([module[0](batch).detach() for batch in data])
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-12
    assert module[1].running_mean.dtype == dtype
    assert torch.allclose(module[1].running_mean.double(), mean, rtol=tolerance)


@pytest.mark.parametrize("order", ["compiled before", "compiled now"])
def test_compiled_modules(order):
    module, data = network(), batches(4, 4)
    expected = copy.deepcopy(module)
    recalibrate_batchnorm(expected, data)
    for compiled in (torch.compile(module, backend="eager"), nn.Sequential(torch.compile(module, backend="eager"))):
        module[1].reset_running_stats()
        if order == "compiled before":
            compiled.train()(data[0])
        for _ in range(2):
            recalibrate_batchnorm(compiled, data)
            assert same(statistics(module), statistics(expected))
    torch.compiler.reset()


def test_data_parallel_modules():
    module, data = network(), batches(4, 4)
    expected = copy.deepcopy(module)
    recalibrate_batchnorm(expected, data)
    recalibrate_batchnorm(nn.DataParallel(module), data)
    assert same(statistics(module), statistics(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inside_of_a_swap_the_statistics_stay_with_the_average(dtype):
    module, data = network().to(dtype), [batch.to(dtype) for batch in batches(8, 8, 4)]
    average = polyak.WeightAverage(module, polyak.Uniform())
    for _ in range(3):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update()
    raw, weights = statistics(module), average.weights()
    with average.swapped():
        recalibrate_batchnorm(module, data)
        inside = statistics(module)
    assert same(statistics(module), raw)
    assert not same(inside, raw)
    after = average.weights()
    for name, tensor in after.items():
        if name in inside:
            assert torch.equal(tensor.to(inside[name].dtype), inside[name]), name
        else:
            assert torch.equal(tensor, weights[name]), name


def test_progress_shows_a_bar(capsys):
    module, data = network(), batches(4, 4)
    recalibrate_batchnorm(module, data)
    assert capsys.readouterr().out == ""
    recalibrate_batchnorm(module, iter(data), progress=True)
    assert "BatchNorm statistics" in capsys.readouterr().out


# Over ranks. The ragged batches are dealt out so that one rank has more of them.

SIZES = (4, 6, 3)


def rank_main(rank, directory):
    distributed.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2)
    wrapped = nn.parallel.DistributedDataParallel(network())
    mine = batches(*SIZES)[rank::2]
    recalibrate_batchnorm(wrapped, mine, progress=True)
    torch.save(statistics(wrapped.module), f"{directory}/{rank}.pt")
    # A rank may have no batch at all, but not all of them.
    recalibrate_batchnorm(wrapped.module, batches(*SIZES) if rank else [])
    torch.save(statistics(wrapped.module), f"{directory}/alone-{rank}.pt")
    with pytest.raises(ValueError, match="batches: there are none"):
        recalibrate_batchnorm(wrapped, [])
    # A rank that closes its connections while the other still reads from them would break it.
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="torch is built without torch.distributed")
@pytest.mark.skipif(sys.platform == "win32", reason="gloo's files need POSIX")
def test_ranks_together_are_one_process_over_all_batches(tmp_path):
    multiprocessing.spawn(rank_main, args=(str(tmp_path),), nprocs=2)
    expected = network()
    recalibrate_batchnorm(expected, batches(*SIZES))
    for name in ("0", "1", "alone-0", "alone-1"):
        found = torch.load(tmp_path / f"{name}.pt")
        assert found["1.num_batches_tracked"] == len(SIZES)
        for key, tensor in statistics(expected).items():
            assert torch.allclose(found[key], tensor, rtol=1e-6, atol=1e-7), (name, key)
