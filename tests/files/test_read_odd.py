"""Files as people really have them: averages in modules, under odd keys, of parts, beside others."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import polyak
import zoo


def model(value):
    made = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    for parameter in made.parameters():
        nn.init.constant_(parameter, value)
    return made


@pytest.fixture
def raw():
    return model(1.0).state_dict()


@pytest.fixture
def ema():
    return model(2.0).state_dict()


def read(tmp_path, content, name="x.pth", **options):
    torch.save(content, tmp_path / name)
    return polyak.read(tmp_path / name, **options)


class TestModulesThatAverage:
    @pytest.mark.parametrize("attribute", ["ema", "ema_model", "model_ema", "smooth"])
    @pytest.mark.parametrize("library", ["torch", "ema-pytorch"])
    @pytest.mark.parametrize("nested", [True, False])
    @pytest.mark.protects
    def test_as_a_part_of_a_module(self, attribute, library, nested, tmp_path, raw, ema):
        module = nn.Module()
        module.net = model(1.0)
        if library == "torch":
            average = AveragedModel(model(2.0))
        else:
            average = pytest.importorskip("ema_pytorch").EMA(model(1.0), ema_model=model(2.0))
        setattr(module, attribute, average)
        state = module.state_dict()
        checkpoint = read(tmp_path, {"state_dict": state, "epoch": 1} if nested else state)
        assert checkpoint.format == library
        assert zoo.bit_equal(dict(checkpoint.average), ema)
        assert zoo.bit_equal(dict(checkpoint.raw_weights), raw)

    @pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
    @pytest.mark.parametrize("key", [None, "ema", "model_ema"])
    @pytest.mark.protects
    def test_within_a_wrapper(self, wrapper, key, tmp_path, raw, ema):
        average = AveragedModel(model(2.0))
        average.n_averaged.fill_(7)
        state = {f"{wrapper}{name}": tensor for name, tensor in average.state_dict().items()}
        checkpoint = read(tmp_path, state if key is None else {"model": raw, key: state})
        assert (checkpoint.format, checkpoint.counters) == ("torch", {"n_averaged": 7})
        assert zoo.bit_equal(dict(checkpoint.average), ema)
        assert key is None or zoo.bit_equal(dict(checkpoint.raw_weights), raw)

    def test_two_of_them_go_by_their_keys(self, tmp_path, ema):
        content = {"g": model(1.0).state_dict(), "g_ema": AveragedModel(model(2.0)).state_dict()}
        content["d_ema"] = AveragedModel(model(3.0)).state_dict()
        checkpoint = read(tmp_path, content)
        assert sorted(checkpoint.averages) == ["d_ema", "g_ema"]
        assert zoo.bit_equal(dict(checkpoint.averages["g_ema"]), ema)
        assert checkpoint.counters == {"g_ema/n_averaged": 0, "d_ema/n_averaged": 0}

    @pytest.mark.parametrize("key", ["model", "state_dict"])
    def test_under_a_key_that_is_one_of_raw_weights(self, key, tmp_path, ema):
        checkpoint = read(tmp_path, {key: AveragedModel(model(2.0)).state_dict(), "optimizer": {}})
        assert zoo.bit_equal(dict(checkpoint.average), ema)
        assert checkpoint.raw_weights is None


class TestKeys:
    @pytest.mark.parametrize("inside", ["module", "shadow", "state_dict"])
    def test_a_dictionary_within(self, inside, tmp_path, raw, ema):
        checkpoint = read(tmp_path, {"model": raw, "ema": {inside: ema, "updates": 10}})
        assert zoo.bit_equal(dict(checkpoint.average), ema)
        assert zoo.bit_equal(dict(checkpoint.raw_weights), raw)

    @pytest.mark.parametrize("around", ["checkpoint", "state"])
    def test_a_dictionary_around(self, around, tmp_path, raw, ema):
        checkpoint = read(tmp_path, {around: {"model": raw, "ema": ema}, "version": 2})
        assert zoo.bit_equal(dict(checkpoint.average), ema)
        assert zoo.bit_equal(dict(checkpoint.raw_weights), raw)

    @pytest.mark.parametrize("keys", [["callbacks", "Averages{'every': 2}"], ["callbacks", "Averages", "average"]])
    def test_our_own_state_among_those_of_a_trainer(self, keys, tmp_path, raw):
        average = polyak.WeightAverage(model(2.0))
        average.update()
        content = average.state_dict()
        for key in reversed(keys):
            content = {key: content, "other": {"count": 3}}
        checkpoint = read(tmp_path, {**content, "state_dict": raw})
        assert checkpoint.format == "polyak-state"
        assert zoo.bit_equal(dict(checkpoint.average), average.weights())
        assert zoo.bit_equal(dict(checkpoint.raw_weights), dict(raw))

    def test_what_is_passed_over_is_named(self, tmp_path, raw, ema):
        checkpoint = read(tmp_path, {"model": raw, "ema": ema, "swa": raw})
        assert "passed over, though the keys speak of averages: 'swa'" in checkpoint.notes
        checkpoint = read(tmp_path, {"state_dict": raw, "state_dict_ema": {k: v.numpy() for k, v in ema.items()}})
        assert checkpoint.notes == (
            "no average was recognised in it",
            "passed over, though the keys speak of averages: 'state_dict_ema'",
        )

    def test_arrays_among_the_tensors_are_named(self, tmp_path, raw, ema):
        mixed = {name: np.asarray(tensor) if "weight" in name else tensor for name, tensor in ema.items()}
        checkpoint = read(tmp_path, {"state_dict": raw, "state_dict_ema": mixed})
        assert checkpoint.missing == ("0.weight", "1.weight")

    def test_lists_are_positional(self, tmp_path, raw):
        average = list(model(2.0).parameters())
        checkpoint = read(tmp_path, {"model": raw, "ema": average})
        assert (checkpoint.format, list(checkpoint.average)) == ("list", ["0.weight", "0.bias", "1.weight", "1.bias"])

    def test_names_of_our_own_averages_with_dots(self, tmp_path):
        source = model(1.0)
        average = polyak.WeightAverage(source, {"ema0.999": polyak.Exponential(0.999), "b": polyak.Exponential(0.99)})
        average.update()
        for content in (average.state_dict(), {"model": source.state_dict(), "x": average.state_dict()}):
            checkpoint = read(tmp_path, content)
            assert sorted(checkpoint.averages) == ["b", "ema0.999"]

    def test_a_file_of_lightning_with_weights_only(self, tmp_path, ema):
        checkpoint = read(tmp_path, {"state_dict": ema, "pytorch-lightning_version": "2.6.0"})
        # While it trains, Lightning asks no callback what to save into a file of weights only.
        assert "they are the average after the end of the fit, and what is trained before" in checkpoint.notes[1]


class TestScheduleFree:
    def state(self, **group):
        ends = {0: {"z": torch.full((3, 3), 5.0)}, 1: {"z": torch.full((3,), 5.0)}}
        return {"state": ends, "param_groups": [{"betas": (0.5, 0.9), "k": 3, "params": [0, 1], **group}]}

    @pytest.mark.parametrize("key", ["optimizer", "optimizer_state_dict", "optim", "opt", "optimizer_states"])
    @pytest.mark.protects
    def test_wherever_the_optimizer_is(self, key, tmp_path):
        weights = {"weight": torch.ones(3, 3), "bias": torch.ones(3)}
        state = self.state(train_mode=True)
        content = {"state_dict": weights, key: [state] if key == "optimizer_states" else state}
        checkpoint = read(tmp_path, content)
        assert (checkpoint.format, checkpoint.counters) == ("schedule-free", {"k": 3})
        # x = y + (1 - 1 / 0.5) * (z - y)
        assert zoo.bit_equal(dict(checkpoint.average), {name: torch.full_like(weights[name], -3) for name in weights})
        assert zoo.bit_equal(dict(checkpoint.raw_weights), weights)

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "net.", "net.inner."])
    def test_whatever_stands_before_the_names(self, prefix, tmp_path):
        weights = {f"{prefix}weight": torch.ones(3, 3), f"{prefix}bias": torch.ones(3), f"{prefix}mean": torch.ones(3)}
        linear = nn.Linear(3, 3)
        linear.register_buffer("mean", torch.zeros(3))
        content = {"model": weights, "optimizer": self.state(train_mode=True)}
        average = read(tmp_path, content, model=linear).average
        assert [average[name].unique().tolist() for name in ("weight", "bias", "mean")] == [[-3], [-3], [1]]

    def test_another_model(self, tmp_path):
        content = {"model": {"other": torch.ones(3)}, "optimizer": self.state(train_mode=True)}
        with pytest.raises(
            polyak.MismatchError, match=r"x.pth' has no weight 'weight', of which its optimizer has a z"
        ):
            read(tmp_path, content, model=nn.Linear(3, 3))

    @pytest.mark.protects
    def test_the_wrapper_does_not_say_its_mode(self, tmp_path):
        weights = {"weight": torch.ones(3, 3), "bias": torch.ones(3)}
        checkpoint = read(tmp_path, {"model": weights, "optimizer": self.state()})
        assert "the model in it is the average only if it was saved in eval mode" in checkpoint.notes[1]
        with_closure = read(tmp_path, {"model": weights, "optimizer": self.state(weight_lr_power=2.0)})
        assert "the model in it is the average, and what was trained is not in it" in with_closure.notes[1]


class TestParts:
    def test_the_raw_weights_of_a_part(self, tmp_path, raw, ema):
        outer = {f"net.{name}": tensor for name, tensor in raw.items()} | {"loss.weight": torch.ones(1)}
        checkpoint = read(tmp_path, {"state_dict": outer, "state_dict_ema": ema})
        assert zoo.bit_equal(dict(checkpoint.raw_weights), raw)
        assert zoo.bit_equal(checkpoint.weights(), ema)

    def test_no_name_in_common(self, tmp_path, ema):
        checkpoint = read(tmp_path, {"state_dict": {"other": torch.ones(1)}, "state_dict_ema": ema})
        assert zoo.bit_equal(checkpoint.weights(), ema)
        polyak.convert(tmp_path / "x.pth", tmp_path / "y.pth", to="plain")
        assert zoo.bit_equal(torch.load(tmp_path / "y.pth", weights_only=True), ema)

    @pytest.mark.protects
    def test_the_part_that_has_all_parameters(self, tmp_path):
        linear = nn.Linear(3, 3)
        inside = {f"net.{name}": tensor for name, tensor in linear.state_dict().items()}
        state = {"criterion.weight": torch.full((3, 3), 9.0), "temperature": torch.ones(1), **inside}
        checkpoint = read(tmp_path, {"state_dict_ema": state}, model=nn.Linear(3, 3))
        assert zoo.bit_equal(dict(checkpoint.average), linear.state_dict())
        assert "of the part 'net', which has the model's names and shapes" in checkpoint.notes
        teacher = {f"a.teacher.{name}": 2 * tensor for name, tensor in linear.state_dict().items()}
        with pytest.raises(polyak.MismatchError, match=r"in several parts, 'a.teacher', 'net': read it without model="):
            read(tmp_path, {"state_dict_ema": {**teacher, **state}}, model=nn.Linear(3, 3))

    @pytest.mark.protects
    @pytest.mark.parametrize("whole", [True, False])
    def test_lost_dots_with_the_model_at_hand(self, whole, tmp_path):
        part = nn.Module()
        part.diffusion_model = model(1.0)
        averaged = {f"model_ema.{name.replace('.', '')}": tensor + 1 for name, tensor in part.named_parameters()}
        counters = {"model_ema.decay": torch.tensor(0.5), "model_ema.num_updates": torch.tensor(5)}
        state = {f"model.{name}": tensor for name, tensor in part.state_dict().items()}
        checkpoint = read(
            tmp_path, {"state_dict": {**state, **averaged, **counters}}, model=part if whole else part.diffusion_model
        )
        assert {float(tensor.flatten()[0]) for tensor in checkpoint.average.values()} == {2.0}
        assert len(checkpoint.average) == 4

    def test_lost_dots_of_the_whole_module(self, tmp_path):
        module = nn.Module()
        module.model = model(1.0)
        averaged = {f"model_ema.{name.replace('.', '')}": tensor + 1 for name, tensor in module.named_parameters()}
        counters = {"model_ema.decay": torch.tensor(0.5), "model_ema.num_updates": torch.tensor(5)}
        checkpoint = read(tmp_path, {"state_dict": {**module.state_dict(), **averaged, **counters}})
        assert sorted(checkpoint.average) == sorted(name for name, _ in module.named_parameters())


class TestFolders:
    def test_variants(self, tmp_path, ema):
        save_file(ema, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
        assert zoo.bit_equal(dict(polyak.read(tmp_path).average), ema)
        save_file(ema, tmp_path / "diffusion_pytorch_model.bf16.safetensors")
        with pytest.raises(polyak.FileFormatError, match=r"has several variants, .*bf16.*fp16.*: give one of"):
            polyak.read(tmp_path)

    def test_of_accelerate(self, tmp_path, raw):
        save_file(raw, tmp_path / "model.safetensors")
        torch.save({"shadow_params": [torch.ones(1)]}, tmp_path / "custom_checkpoint_0.pkl")
        folder = polyak.read(tmp_path)
        assert (folder.format, dict(folder.averages)) == ("accelerate-folder", {})
        assert "an average may be in 'custom_checkpoint_0.pkl' of this folder: read that file" in folder.notes
        assert zoo.bit_equal(dict(folder.raw_weights), raw)

    def test_a_neighbour_that_cannot_be_read(self, tmp_path, ema):
        (tmp_path / "unet").mkdir()
        (tmp_path / "unet_ema").mkdir()
        save_file(ema, tmp_path / "unet_ema" / "diffusion_pytorch_model.safetensors")
        (tmp_path / "unet_ema" / "config.json").write_text('{"optimization_step": 3, "decay": 0.9}')
        checkpoint = polyak.read(tmp_path / "unet_ema")
        assert checkpoint.raw_weights is None
        assert "no raw weights, for 'unet' beside it cannot be read" in checkpoint.notes[1]


class Mapped(dict):
    pass


class TestObjects:
    def test_kinds_of_dictionaries_keep_their_items(self, tmp_path, raw, ema):
        content = {"state_dict": Mapped(raw), "state_dict_ema": Mapped(ema)}
        checkpoint = read(tmp_path, content, skip_objects=True)
        assert zoo.bit_equal(dict(checkpoint.average), ema)

    def test_methods_and_odd_keys_are_passed_over(self, tmp_path, ema):
        content = {"state_dict_ema": ema, "x": TestObjects.test_methods_and_odd_keys_are_passed_over, "y": {nn.ReLU: 1}}
        assert zoo.bit_equal(dict(read(tmp_path, content, skip_objects=True).average), ema)

    @pytest.mark.parametrize("value", [1j, range(3), slice(2), bytearray(b"a"), {((1, 2), 3): 4}, torch.uint4])
    def test_plain_values_of_python(self, value, tmp_path, ema):
        assert zoo.bit_equal(dict(read(tmp_path, {"state_dict_ema": ema, "x": value}).average), ema)

    def test_expanded_tensors(self, tmp_path, ema):
        content = {"state_dict_ema": {**ema, "mask": torch.zeros(1, 1, 1).expand(8, 128, 128)}}
        assert read(tmp_path, content).average["mask"].shape == (8, 128, 128)
