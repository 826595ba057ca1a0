"""The classic class against its formula in float64, on what people give it."""

import argparse
import copy
import logging
import os

import pytest
import torch
from torch import nn

import polyak
import zoo
from reference.seed import SeedFormula

# float32 rounds each of the updates; the seed's own arithmetic is ten times worse.
TOLERANCE = 3e-6


class DataParallelLike(nn.Module):
    """What apex and others do: hold the model under `module`, and call it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        return self.module(*inputs)


@pytest.fixture
def ddp():
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield nn.parallel.DistributedDataParallel
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", zoo.MODELS)
def test_follows_the_formula(name):
    model = zoo.MODELS[name]()
    reference = SeedFormula(model.state_dict(), 0.9)
    ema = polyak.ModelEma(model, decay=0.9)
    for _ in range(50):
        zoo.drift(model)
        reference.update(model.state_dict())
        ema.update(model)
    assert reference.largest_error(ema.ema.state_dict()) < TOLERANCE


def test_constant_weights_stay_what_they_are_over_many_updates():
    model = zoo.TiedTransformer()
    ema = polyak.ModelEma(model, decay=0.9999)
    before = zoo.clone(ema.ema.state_dict())
    for _ in range(10_000):
        ema.update(model)
    assert zoo.bit_equal(ema.ema.state_dict(), before)


@pytest.mark.protects
def test_tied_weights_move_once():
    model = zoo.TiedTransformer()
    nn.init.zeros_(model.head.weight)
    ema = polyak.ModelEma(model, decay=0.5)
    nn.init.ones_(model.head.weight)
    ema.update(model)
    assert ema.ema.head.weight is ema.ema.embedding.weight
    assert torch.equal(ema.ema.head.weight, torch.full((11, 8), 0.5))


@pytest.mark.protects
def test_integers_and_booleans_are_copied():
    model = zoo.Buffers()
    ema = polyak.ModelEma(model, decay=0.9999)
    for step in range(3):
        model.scalar.fill_(step)
        ema.update(model)
    assert torch.equal(ema.ema.table, torch.arange(100))
    assert torch.equal(ema.ema.mask, torch.tensor([True, False, True]))
    assert ema.ema.scalar == 2


@pytest.mark.protects
def test_shares_no_storage_with_the_model_and_frozen_parameters_are_averaged():
    model = zoo.mlp()
    model[0].requires_grad_(False)
    ema = polyak.ModelEma(model, decay=0.5)
    addresses = {tensor.data_ptr() for tensor in model.parameters()}
    assert addresses.isdisjoint(tensor.data_ptr() for tensor in ema.ema.parameters())
    before = model[0].weight.clone()
    model[0].weight += 1.0
    ema.update(model)
    torch.testing.assert_close(ema.ema[0].weight, before + 0.5)


def test_surface():
    model = zoo.batchnorm().train()
    ema = polyak.ModelEma(model, 0.9, "", "")
    assert (ema.decay, ema.device, ema.ema_has_module) == (0.9, "", False)
    assert ema.module is ema.ema
    assert type(ema.ema) is nn.Sequential
    assert not ema.ema.training
    assert model.training
    assert not any(parameter.requires_grad for parameter in ema.ema.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_decay_may_be_changed():
    model = zoo.mlp()
    ema = polyak.ModelEma(model, decay=1.0)
    zoo.drift(model)
    ema.decay = 0.0
    ema.update(model)
    assert zoo.bit_equal(ema.ema.state_dict(), model.state_dict())


@pytest.mark.parametrize("decay", [-0.1, 1.5, float("nan")])
def test_impossible_decay(decay):
    with pytest.raises(ValueError, match=r"decay="):
        polyak.ModelEma(zoo.mlp(), decay=decay)


@pytest.mark.parametrize("wrap", [nn.DataParallel, DataParallelLike])
@pytest.mark.parametrize("wrapped_average", [False, True])
@pytest.mark.parametrize("wrapped_model", [False, True])
def test_wrapped_and_bare_models(wrap, wrapped_average, wrapped_model):
    model = zoo.batchnorm()
    reference = SeedFormula(model.state_dict(), 0.9)
    wrapped = wrap(model)
    ema = polyak.ModelEma(wrapped if wrapped_average else model, decay=0.9)
    assert ema.ema_has_module == wrapped_average == hasattr(ema.ema, "module")
    for _ in range(5):
        zoo.drift(model)
        reference.update(model.state_dict())
        ema.update(wrapped if wrapped_model else model)
    average = ema.ema.module if wrapped_average else ema.ema
    assert reference.largest_error(average.state_dict()) < TOLERANCE
    inputs = torch.randn(2, 2, 4, 4)
    torch.testing.assert_close(ema.ema(inputs), average(inputs))


@pytest.mark.protects
@pytest.mark.parametrize("wrapped_average", [False, True])
def test_ddp(ddp, wrapped_average):
    model = zoo.batchnorm()
    reference = SeedFormula(model.state_dict(), 0.9)
    wrapped = ddp(model)
    ema = polyak.ModelEma(wrapped if wrapped_average else model, decay=0.9)
    for _ in range(5):
        zoo.drift(model)
        reference.update(model.state_dict())
        ema.update(model if wrapped_average else wrapped)
    average = ema.ema.module if wrapped_average else ema.ema
    assert reference.largest_error(average.state_dict()) < TOLERANCE
    assert ema.ema(torch.randn(2, 2, 4, 4)).shape == (2, 3)


def test_compiled_model():
    model = zoo.mlp()
    ema = polyak.ModelEma(torch.compile(model), decay=0.5)
    assert type(ema.ema) is nn.Sequential
    reference = SeedFormula(model.state_dict(), 0.5)
    for each in (torch.compile(model), model):
        zoo.drift(model)
        reference.update(model.state_dict())
        ema.update(each)
    assert reference.largest_error(ema.ema.state_dict()) < TOLERANCE


def test_on_the_cpu():
    model = zoo.batchnorm()
    ema = polyak.ModelEma(model, decay=0.9, device="cpu")
    assert ema.device == "cpu"
    ema.update(model)
    assert all(tensor.device.type == "cpu" for tensor in ema.ema.state_dict().values())


@pytest.mark.protects
def test_another_model_is_an_error_and_nothing_is_written():
    model = zoo.mlp()
    ema = polyak.ModelEma(model, decay=0.5)
    before = zoo.clone(ema.ema.state_dict())
    broadcasting = zoo.mlp()
    broadcasting[2] = nn.Linear(5, 1)
    with pytest.raises(polyak.MismatchError, match=r"'2.weight' of the model has the shape \(1, 5\), not \(3, 5\)"):
        ema.update(broadcasting)
    with pytest.raises(polyak.MismatchError, match=r"Only the average: '2.weight', '2.bias'"):
        ema.update(nn.Sequential(nn.Linear(6, 5)))
    with pytest.raises(TypeError, match=r"a torch.nn.Module is needed, not dict"):
        ema.update({})
    assert zoo.bit_equal(ema.ema.state_dict(), before)
    ema.update(model)


@pytest.mark.protects
def test_layers_in_another_order_are_matched_by_name():
    class Model(nn.Module):
        def __init__(self, names):
            super().__init__()
            for name in names:
                setattr(self, name, nn.Linear(2, 2))

    model, reordered = Model(["first", "second"]), Model(["second", "first"])
    ema = polyak.ModelEma(model, decay=0.0)
    ema.update(reordered)
    assert torch.equal(ema.ema.first.weight, reordered.first.weight)
    assert torch.equal(ema.ema.second.weight, reordered.second.weight)


class TestPeopleMoveLoadAndSaveTheAverage:
    def test_loaded_in_place(self):
        model = zoo.mlp()
        ema = polyak.ModelEma(model, decay=0.5)
        zeros = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
        ema.ema.load_state_dict(zeros)
        ema.update(model)
        torch.testing.assert_close(ema.ema[0].weight, model[0].weight.detach() / 2)

    @pytest.mark.protects
    def test_replaced_tensors_are_followed(self):
        model = zoo.mlp()
        ema = polyak.ModelEma(model, decay=0.5)
        zeros = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
        ema.ema.load_state_dict(zeros, assign=True)
        ema.update(model)
        torch.testing.assert_close(ema.ema[0].weight.detach(), model[0].weight.detach() / 2)

    def test_cast_to_float64_is_followed(self):
        model = zoo.mlp()
        ema = polyak.ModelEma(model, decay=0.5)
        ema.ema.double()
        zoo.drift(model)
        ema.update(model)
        assert ema.ema[0].weight.dtype == torch.float64

    def test_cast_to_16_bits_is_refused(self):
        model = zoo.mlp()
        ema = polyak.ModelEma(model)
        ema.ema.half()
        with pytest.raises(ValueError, match=r"in which an average does not move.*Go back by ema.float"):
            ema.update(model)


class TestResume:
    def saved(self, tmp_path, content):
        path = tmp_path / "checkpoint.pth.tar"
        torch.save(content, path)
        return path

    @pytest.mark.parametrize("prefix", ["", "module."])
    @pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel])
    def test_from_state_dict_ema(self, tmp_path, prefix, wrap):
        saved = zoo.batchnorm().state_dict()
        path = self.saved(tmp_path, {"state_dict_ema": {prefix + name: t for name, t in saved.items()}})
        ema = polyak.ModelEma(wrap(zoo.batchnorm()), resume=str(path))
        average = ema.ema.module if ema.ema_has_module else ema.ema
        assert zoo.bit_equal(average.state_dict(), saved)

    def test_goes_on_as_if_never_stopped(self, tmp_path):
        model = zoo.batchnorm()
        straight = polyak.ModelEma(model, decay=0.9)
        for _ in range(3):
            zoo.drift(model)
            straight.update(model)
        path = self.saved(tmp_path, {"state_dict_ema": straight.ema.state_dict()})
        resumed = polyak.ModelEma(copy.deepcopy(model), decay=0.9, resume=path)
        for _ in range(3):
            zoo.drift(model)
            straight.update(model)
            resumed.update(model)
        assert zoo.bit_equal(straight.ema.state_dict(), resumed.ema.state_dict())

    def test_timm_checkpoint_with_its_arguments(self, tmp_path):
        saved = zoo.mlp().state_dict()
        arguments = argparse.Namespace(model="resnet50", lr=0.1, opt_betas=None)
        path = self.saved(tmp_path, {"epoch": 3, "args": arguments, "state_dict": saved, "state_dict_ema": saved})
        assert zoo.bit_equal(polyak.ModelEma(zoo.mlp(), resume=path).ema.state_dict(), saved)

    def test_without_state_dict_ema_warns_and_keeps_the_weights(self, tmp_path, caplog):
        model = zoo.mlp()
        path = self.saved(tmp_path, {"state_dict": zoo.mlp().state_dict()})
        with caplog.at_level(logging.WARNING):
            ema = polyak.ModelEma(model, resume=path)
        assert "Failed to find state_dict_ema" in caplog.text
        assert zoo.bit_equal(ema.ema.state_dict(), model.state_dict())

    def test_damaged_files(self, tmp_path):
        path = self.saved(tmp_path, {"state_dict_ema": zoo.mlp().state_dict()})
        content = path.read_bytes()
        for damaged in (b"", b"nonsense", content[: len(content) // 2], content[100:]):
            path.write_bytes(damaged)
            with pytest.raises(polyak.FileFormatError, match=r"checkpoint\.pth\.tar"):
                polyak.ModelEma(zoo.mlp(), resume=path)

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere"):
            polyak.ModelEma(zoo.mlp(), resume=tmp_path / "nowhere")

    @pytest.mark.parametrize("content", [[1, 2], {"state_dict_ema": [1]}, {"state_dict_ema": {1: 2}}])
    def test_no_dictionary(self, tmp_path, content):
        with pytest.raises(polyak.FileFormatError, match=r"dictionary"):
            polyak.ModelEma(zoo.mlp(), resume=self.saved(tmp_path, content))

    @pytest.mark.protects
    def test_pickled_code_does_not_run(self, tmp_path):
        canary = tmp_path / "canary"
        path = self.saved(tmp_path, {"state_dict_ema": _Runs(f"open({str(canary)!r}, 'w')")})
        with pytest.raises(polyak.FileFormatError, match=r"could run code, and is not read"):
            polyak.ModelEma(zoo.mlp(), resume=path)
        assert not canary.exists()

    def test_another_models_file(self, tmp_path):
        path = self.saved(tmp_path, {"state_dict_ema": zoo.batchnorm().state_dict()})
        with pytest.raises(polyak.MismatchError, match=r"hold different tensors"):
            polyak.ModelEma(zoo.mlp(), resume=path)
        broadcasting = {name: tensor[:1] for name, tensor in zoo.mlp().state_dict().items()}
        path = self.saved(tmp_path, {"state_dict_ema": broadcasting})
        with pytest.raises(polyak.MismatchError, match=r"'0.weight' .* is \(1, 6\), and \(5, 6\) in the model"):
            polyak.ModelEma(zoo.mlp(), resume=path)


class _Runs:
    """Pickles as a call of eval."""

    def __init__(self, code):
        self.code = code

    def __reduce__(self):
        return eval, (self.code,)
