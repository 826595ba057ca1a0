"""What was converted loads in the real library, by its own way of loading, and trains on there by its own formula."""

import json

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import convert_cases as cases
import polyak
import zoo
from benchmarks.timm_file import timm_averages
from convert_cases import DECAY

pytestmark = pytest.mark.usefixtures("seed")
SOURCES = pytest.mark.parametrize("source", ["timm", "ema_pytorch", "export", "lightning"])
TIGHT = {"rtol": 1e-6, "atol": 1e-7}


@pytest.fixture
def seed():
    torch.manual_seed(0)


def train_step(model, inputs=None):
    """A step of SGD, with what BatchNorm learns from the batch."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(8, 2, 4, 4) if inputs is None else inputs).square().mean().backward()
    optimizer.step()


def floating(tensors):
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def moved(average, weights, decay):
    """The formula that all of them have: what the average becomes."""
    return {name: decay * average[name] + (1 - decay) * weights[name] for name in floating(average)}


def check_next(after, before, weights, decay):
    """Whether an average has become what the formula says, of parameters and floating buffers alike."""
    for name, expected in moved(before, weights, decay).items():
        torch.testing.assert_close(after[name], expected, **TIGHT)
    assert not zoo.bit_equal(dict(after), dict(before))


@SOURCES
def test_timm(source, tmp_path):
    helpers, averages = cases.timm_file("models", "_helpers.py"), timm_averages()
    case = cases.CASES[source](tmp_path)
    path = tmp_path / "out.pth.tar"
    polyak.convert(case.path, path, to="timm")
    # As train.py resumes: the weights, then those of the average.
    model = zoo.batchnorm()
    epoch = helpers.resume_checkpoint(model, str(path), log_info=False)
    assert epoch == {"timm": 8, "lightning": 2}.get(source)
    assert zoo.bit_equal(model.state_dict(), case.average if case.raw is None else case.raw)
    average = averages.ModelEmaV3(model, decay=DECAY)
    helpers.load_checkpoint(average.module, str(path), use_ema=True)
    assert zoo.bit_equal(average.module.state_dict(), case.average)
    train_step(model)
    average.update(model)
    check_next(average.module.state_dict(), case.average, model.state_dict(), DECAY)


@SOURCES
def test_torch(source, tmp_path):
    case = cases.CASES[source](tmp_path)
    polyak.convert(case.path, tmp_path / "out.pt", to="torch")
    average = AveragedModel(zoo.batchnorm(), multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
    average.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))
    assert zoo.bit_equal(average.module.state_dict(), case.average)
    train_step(case.model)
    average.update_parameters(case.model)
    check_next(average.module.state_dict(), case.average, case.model.state_dict(), DECAY)


@SOURCES
def test_ema_pytorch(source, tmp_path):
    case = cases.CASES[source](tmp_path)
    polyak.convert(case.path, tmp_path / "out.pt", to="ema-pytorch")
    average = pytest.importorskip("ema_pytorch").EMA(zoo.batchnorm(), beta=0.999, update_after_step=0, update_every=1)
    average.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))
    assert zoo.bit_equal(average.ema_model.state_dict(), case.average)
    assert zoo.bit_equal(average.model.state_dict(), case.average if case.raw is None else case.raw)
    train_step(average.model)
    average.update()
    # Three updates were made, and this is the fourth; where the file did not say so the warm-up is over.
    decay = 0.999 if source == "timm" else 1 - (1 + 3) ** (-2 / 3)
    check_next(average.ema_model.state_dict(), case.average, average.model.state_dict(), decay)


@SOURCES
def test_torch_ema(source, tmp_path):
    case = cases.CASES[source](tmp_path)
    polyak.convert(case.path, tmp_path / "out.pt", to="torch-ema", model=case.model, decay=DECAY)
    average = pytest.importorskip("torch_ema").ExponentialMovingAverage(case.model.parameters(), decay=0.5)
    average.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))
    train_step(case.model)
    average.update()
    names = [name for name, _ in case.model.named_parameters()]
    before = {name: case.average[name] for name in names}
    check_next(dict(zip(names, average.shadow_params, strict=True)), before, case.model.state_dict(), DECAY)
    if case.raw is not None:
        average.restore()
        assert all(torch.equal(case.model.get_parameter(name), case.raw[name]) for name in names)


@pytest.mark.filterwarnings("ignore:It is deprecated to pass a pretrained model name or path to `from_config`")
@pytest.mark.parametrize("source", ["timm", "torch_ema"])
def test_diffusers(source, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    training_utils = pytest.importorskip("diffusers.training_utils")

    class Net(diffusers.ModelMixin, diffusers.ConfigMixin):
        @diffusers.configuration_utils.register_to_config
        def __init__(self, width=2):
            super().__init__()
            self.layer = nn.Linear(3, width)
            self.head = nn.Linear(width, 1, bias=False)

    model = Net(width=4)
    model.save_config(tmp_path)
    names = [name for name, _ in model.named_parameters()]
    case = cases.CASES[source](tmp_path, model)
    before = {name: case.average[name].clone() for name in names}
    given = {"decay": DECAY} if source == "timm" else {"names": names}
    folder = tmp_path / "unet_ema"
    polyak.convert(case.path, folder, to="diffusers", config=tmp_path / "config.json", max_shard_bytes=50, **given)
    assert (folder / "diffusion_pytorch_model.safetensors.index.json").exists()
    found = training_utils.EMAModel.from_pretrained(folder, Net)
    assert zoo.bit_equal(dict(zip(names, found.shadow_params, strict=True)), before)
    assert found.model_config["width"] == 4
    zoo.drift(model)
    found.step(model.parameters())
    # torch_ema and diffusers warm up alike: three updates were made, and this is the fourth.
    decay = DECAY if source == "timm" else (1 + 4) / (10 + 4)
    assert found.cur_decay_value == decay
    check_next(dict(zip(names, found.shadow_params, strict=True)), before, model.state_dict(), decay)
    found.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["decay"] == DECAY


@pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated",
    "ignore:The 'train_dataloader' does not have many workers",
)
@pytest.mark.parametrize(("source", "num_updates"), [("timm", 1), ("ema_pytorch", 3), ("torch_ema", 3)])
def test_lightning(source, num_updates, tmp_path):
    lightning = pytest.importorskip("lightning")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    seen = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh() if source == "torch_ema" else nn.BatchNorm1d(4))

        def training_step(self, batch, index):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    class Watched(callbacks.EMAWeightAveraging):
        # The name by which Lightning finds its state in the file.
        state_key = "EMAWeightAveraging"

        def watch(self, module):
            seen.append((zoo.clone(module.net.state_dict()), zoo.clone(self._average_model.module.net.state_dict())))

        def on_train_start(self, trainer, module):
            self.watch(module)

        def on_train_batch_end(self, trainer, module, *rest):
            super().on_train_batch_end(trainer, module, *rest)
            self.watch(module)

    case = cases.CASES[source](tmp_path, Module().net)
    polyak.convert(case.path, tmp_path / "out.ckpt", to="lightning", model=Module())
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Watched(decay=DECAY)],
    )
    data = torch.utils.data.DataLoader(torch.randn(8, 3), batch_size=4)
    trainer.fit(Module(), data, ckpt_path=tmp_path / "out.ckpt")
    (weights, before), *steps = seen
    assert zoo.bit_equal(before, case.average)
    assert zoo.bit_equal(weights, case.raw)
    assert len(steps) == trainer.global_step == 2
    for weights, after in steps:
        check_next(after, before, weights, DECAY)
        before = after
    assert trainer.callbacks[0]._average_model.n_averaged == num_updates + 2
    # What Lightning itself saves goes on elsewhere.
    trainer.save_checkpoint(tmp_path / "theirs.ckpt")
    polyak.convert(tmp_path / "theirs.ckpt", tmp_path / "out.pt", to="torch", model=case.model)
    average = AveragedModel(case.model)
    average.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))
    assert zoo.bit_equal(average.module.state_dict(), before)
    assert average.n_averaged == num_updates + 2


@pytest.mark.parametrize("tied", [True, False], ids=["tied in the file", "by every name"])
def test_transformers(tied, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=13, n_positions=6)
    model = transformers.GPT2LMHeadModel(config)
    average = polyak.WeightAverage(model, polyak.Exponential(DECAY))
    cases.train(model, average.update)
    if tied:
        torch.save({"model": model.state_dict(), "model_ema": average.module().state_dict()}, tmp_path / "in.pth")
    else:
        average.export(tmp_path / "in.safetensors")
    config.save_pretrained(tmp_path)
    path = tmp_path / ("in.pth" if tied else "in.safetensors")
    polyak.convert(path, tmp_path / "out", to="huggingface", config=tmp_path, max_shard_bytes=2000)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    loaded, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert zoo.bit_equal(loaded.state_dict(), average.weights())
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    tokens = torch.arange(6)[None]
    loss = loaded(tokens, labels=tokens).loss
    loss.backward()
    torch.optim.SGD(loaded.parameters(), lr=0.1).step()
    assert loaded(tokens, labels=tokens).loss < loss


class TestGoingOnElsewhere:
    """Averages that go on in another library are what they would have become where they came from."""

    def check(self, ours, theirs):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, **TIGHT)

    def test_from_torch_to_torch_ema(self, tmp_path):
        model = zoo.mlp()
        here = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
        cases.train(model, lambda: here.update_parameters(model))
        torch.save(here.state_dict(), tmp_path / "in.pt")
        polyak.convert(tmp_path / "in.pt", tmp_path / "out.pt", to="torch-ema", model=model, decay=DECAY)
        there = pytest.importorskip("torch_ema").ExponentialMovingAverage(model.parameters(), decay=DECAY)
        there.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))
        cases.train(model, lambda: (here.update_parameters(model), there.update()), times=20)
        self.check(there.shadow_params, here.module.parameters())

    @pytest.mark.parametrize("use_num_updates", [True, False])
    def test_from_torch_ema_to_diffusers_and_back(self, use_num_updates, tmp_path):
        training_utils = pytest.importorskip("diffusers.training_utils")
        model = zoo.mlp()
        here = pytest.importorskip("torch_ema").ExponentialMovingAverage(model.parameters(), DECAY, use_num_updates)
        cases.train(model, here.update)
        torch.save(here.state_dict(), tmp_path / "in.pt")
        polyak.convert(
            tmp_path / "in.pt", tmp_path / "there", to="diffusers", model=model, config=cases.config(tmp_path)
        )
        there = training_utils.EMAModel(here.shadow_params)
        there.load_state_dict(json.loads((tmp_path / "there" / "config.json").read_text()))
        cases.train(model, lambda: (here.update(), there.step(model.parameters())), times=20)
        self.check(there.shadow_params, here.shadow_params)
        torch.save(there.state_dict(), tmp_path / "there.pt")
        polyak.convert(tmp_path / "there.pt", tmp_path / "out.pt", to="torch-ema")
        back = pytest.importorskip("torch_ema").ExponentialMovingAverage(model.parameters(), decay=0.5)
        back.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))
        assert (back.decay, back.num_updates) == (DECAY, here.num_updates)
        cases.train(model, lambda: (here.update(), back.update()), times=20)
        self.check(back.shadow_params, here.shadow_params)

    def test_a_uniform_average_from_torch_to_torch_through_another(self, tmp_path):
        model = zoo.mlp()
        here = AveragedModel(model)
        cases.train(model, lambda: here.update_parameters(model))
        torch.save(here.state_dict(), tmp_path / "in.pt")
        polyak.convert(tmp_path / "in.pt", tmp_path / "between.ckpt", to="lightning")
        polyak.convert(tmp_path / "between.ckpt", tmp_path / "out.pt", to="torch")
        there = AveragedModel(model)
        there.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))
        cases.train(model, lambda: (here.update_parameters(model), there.update_parameters(model)), times=20)
        self.check(there.parameters(), here.parameters())

    def test_of_ours_to_torch(self, tmp_path):
        model = zoo.mlp()
        here = polyak.WeightAverage(model, polyak.Exponential(DECAY))
        cases.train(model, here.update)
        here.export(tmp_path / "in.safetensors")
        polyak.convert(tmp_path / "in.safetensors", tmp_path / "out.pt", to="torch")
        there = AveragedModel(model, avg_fn=get_ema_avg_fn(DECAY))
        there.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))
        cases.train(model, lambda: (here.update(), there.update_parameters(model)), times=20)
        self.check(there.module.state_dict().values(), here.weights().values())
