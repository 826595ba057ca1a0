"""Averages from one layout to another: what is in the file then, and what is refused."""

import json
from itertools import cycle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import convert_cases as cases
import library_files
import polyak
import zoo


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def contents(folder):
    return sorted(entry.name for entry in folder.iterdir())


# Each at least once; `test_convert_layouts` has all that are read, with all that are written.
@pytest.mark.parametrize(("source", "to"), [*zip(cycle(cases.CASES), cases.TARGETS), ("export", "safetensors")])
def test_with_a_model(source, to, tmp_path):
    case = cases.CASES[source](tmp_path)
    output, config = tmp_path / cases.TARGETS[to], cases.config(tmp_path)
    done = polyak.convert(case.path, output, to=to, model=case.model, config=config)
    assert (done.path, done.to, done.input, done.average) == (output, to, case.path, "average")
    found = polyak.read(output, model=case.model)
    expected = {"safetensors": "polyak" if source == "export" else "plain"}.get(to, to)
    assert found.format == expected
    names = dict(case.model.named_parameters(remove_duplicate=False)) if to == "torch-ema" else case.average
    assert zoo.bit_equal(dict(found.average), {name: case.average[name] for name in names})
    if to in ("timm", "ema-pytorch", "lightning"):
        raw = case.average if case.raw is None else case.raw
        assert zoo.bit_equal(dict(found.raw_weights), raw)


@pytest.mark.parametrize("source", ["torch_average", "ema_pytorch", "export", "lightning"])
@pytest.mark.parametrize(
    ("to", "counter"),
    [("torch", "n_averaged"), ("ema-pytorch", "step"), ("diffusers", "optimization_step"), ("lightning", "n_averaged")],
)
def test_the_number_of_updates_goes_along(source, to, counter, tmp_path):
    case = cases.CASES[source](tmp_path)
    output = tmp_path / cases.TARGETS[to]
    polyak.convert(case.path, output, to=to, config=cases.config(tmp_path))
    assert polyak.read(output).counters[counter] == cases.NUM_UPDATES


def test_integers_are_not_cast_and_raw_weights_are(tmp_path):
    case = cases.timm(tmp_path)
    done = polyak.convert(case.path, tmp_path / "out.pth", to="timm", dtype=torch.bfloat16)
    found = polyak.read(tmp_path / "out.pth")
    for kept, given in ((found.average, case.average), (found.raw_weights, case.raw)):
        assert zoo.bit_equal(
            dict(kept), {name: t.bfloat16() if t.is_floating_point() else t for name, t in given.items()}
        )
    assert done.num_bytes == sum(tensor.numel() * tensor.element_size() for tensor in found.average.values())


@pytest.mark.protects
def test_a_number_that_becomes_infinite_is_refused(tmp_path):
    torch.save({"state_dict_ema": {"weight": torch.tensor([1e5, float("inf")])}}, tmp_path / "in.pth")
    with pytest.raises(
        ValueError, match=r"'weight' of '.*in.pth' has the number 100000, and torch.float16 ends at 65504"
    ):
        polyak.convert(tmp_path / "in.pth", tmp_path / "out.pth", to="plain", dtype=torch.float16)
    assert contents(tmp_path) == ["in.pth"]
    polyak.convert(tmp_path / "in.pth", tmp_path / "out.pth", to="plain", dtype=torch.bfloat16)


class TestTies:
    def test_in_files_of_torch_save_they_share_memory(self, tmp_path):
        case = cases.timm(tmp_path, zoo.TiedTransformer())
        polyak.convert(case.path, tmp_path / "out.pth", to="plain", dtype=torch.float64)
        loaded = torch.load(tmp_path / "out.pth", weights_only=True)
        assert loaded["head.weight"].data_ptr() == loaded["embedding.weight"].data_ptr()
        assert loaded["head.weight"].dtype == torch.float64

    def test_in_safetensors_each_name_is_there_for_a_strict_load(self, tmp_path):
        case = cases.timm(tmp_path, zoo.TiedTransformer())
        polyak.convert(case.path, tmp_path / "out.safetensors", to="safetensors")
        zoo.TiedTransformer().load_state_dict(load_file(tmp_path / "out.safetensors"))

    def test_a_folder_for_transformers_has_the_first_name(self, tmp_path):
        case = cases.timm(tmp_path, zoo.TiedTransformer())
        done = polyak.convert(case.path, tmp_path / "out", to="huggingface")
        assert set(load_file(tmp_path / "out" / "model.safetensors")) == case.average.keys() - {"head.weight"}
        assert "1 tied names are left out, as transformers leaves them out" in done.notes

    def test_positional_layouts_have_them_once(self, tmp_path):
        case = cases.timm(tmp_path, zoo.TiedTransformer())
        names = [name for name, _ in case.model.named_parameters()]
        for given in ({"names": names}, {"model": zoo.TiedTransformer()}):
            polyak.convert(case.path, tmp_path / "out.pth", to="torch-ema", **given)
            kept = torch.load(tmp_path / "out.pth", weights_only=True)
            assert zoo.bit_equal(
                dict(zip(names, kept["shadow_params"], strict=True)), {name: case.average[name] for name in names}
            )
            assert zoo.bit_equal(
                dict(zip(names, kept["collected_params"], strict=True)), {name: case.raw[name] for name in names}
            )


class TestWhatIsMissing:
    def test_raw_weights_are_the_average(self, tmp_path):
        case = cases.torch_average(tmp_path)
        done = polyak.convert(case.path, tmp_path / "out.pth", to="timm")
        assert any("the input has no raw weights: where those go stands the average" in note for note in done.notes)
        loaded = torch.load(tmp_path / "out.pth", weights_only=True)
        assert zoo.bit_equal(loaded["state_dict"], case.average)

    def test_what_was_not_averaged_comes_from_the_raw_weights(self, tmp_path):
        case = cases.timm(tmp_path)
        content = torch.load(case.path, weights_only=True)
        for name in ("1.running_mean", "4.bias"):
            del content["state_dict_ema"][name]
        torch.save(content, case.path)
        done = polyak.convert(case.path, tmp_path / "out.pth", to="plain")
        assert "not averaged, and as in the raw weights: '1.running_mean', '4.bias'" in done.notes
        loaded = torch.load(tmp_path / "out.pth", weights_only=True)
        assert list(loaded) == list(case.raw)
        assert torch.equal(loaded["4.bias"], case.raw["4.bias"])

    @pytest.mark.protects
    def test_what_is_not_trained_is_taken_from_the_model_with_a_warning(self, tmp_path):
        case = cases.timm(tmp_path)
        case.model[0].bias.requires_grad_(False)
        parameters = [name for name, tensor in case.model.named_parameters() if tensor.requires_grad]
        torch.save({"ema": {name: case.average[name] for name in parameters}}, tmp_path / "in.pth")
        with pytest.warns(UserWarning, match=r"in.pth' has no '0.bias', '1.running_mean', .* which has to be the one"):
            polyak.convert(tmp_path / "in.pth", tmp_path / "out.pth", to="plain", model=case.model)
        loaded = torch.load(tmp_path / "out.pth", weights_only=True)
        zoo.batchnorm().load_state_dict(loaded)
        assert all(torch.equal(loaded[name], case.raw[name]) for name in ("0.bias", "1.running_mean"))

    def test_parameters_of_the_model_are_not_made_up(self, tmp_path):
        case = cases.torch_average(tmp_path)
        torch.save({"ema": {"0.weight": case.average["0.weight"]}}, tmp_path / "in.pth")
        with pytest.raises(
            polyak.MismatchError, match=r"the model has '0.bias', .*in.pth' does not; give the model that"
        ):
            polyak.convert(tmp_path / "in.pth", tmp_path / "out.pth", to="plain", model=case.model)

    def test_numbers_of_updates_are_such_that_the_average_goes_on(self, tmp_path):
        case = cases.timm(tmp_path)
        polyak.convert(case.path, tmp_path / "swa.pth", to="torch")
        assert polyak.read(tmp_path / "swa.pth").counters == {"n_averaged": 1}
        done = polyak.convert(case.path, tmp_path / "ema.pt", to="ema-pytorch")
        assert polyak.read(tmp_path / "ema.pt").counters == {"step": 1_000_000, "initted": True}
        assert "the input has no number of updates; step is 1,000,000, where the warm-up is over" in done.notes

    @pytest.mark.parametrize("to", ["torch", "lightning"])
    @pytest.mark.parametrize("source", ["lightning-swa", "composer-swa", "mmengine", "mmengine-module"])
    def test_a_copy_that_is_still_to_come_is_made_there(self, source, to, tmp_path):
        weights, none = {"w": torch.ones(2)}, torch.tensor(0)
        below = {"module.w": torch.ones(2)}
        swa = {"n_averaged": 0, "average_model_state": weights, "latest_update_epoch": -1}
        composer = {"model": weights, "algorithms": [("SWA", {"swa_model": {"n_averaged": none, **below}})]}
        content = {
            "lightning-swa": {"callbacks": {"StochasticWeightAveraging": swa}, "state_dict": weights},
            "composer-swa": {"state": composer},
            "mmengine": {"state_dict": weights, "ema_state_dict": {"steps": none, **below}},
            "mmengine-module": {"steps": none, **below},
        }
        torch.save(content[source], tmp_path / "in.pth")
        found = polyak.read(tmp_path / "in.pth")
        assert found.format == source
        assert "nothing was averaged yet when it was saved" in found.notes
        polyak.convert(tmp_path / "in.pth", tmp_path / "out.pth", to=to)
        assert polyak.read(tmp_path / "out.pth").counters["n_averaged"] == 0

    def test_decays(self, tmp_path):
        case = cases.torch_average(tmp_path)
        names = list(dict(case.model.named_parameters()))
        done = polyak.convert(case.path, tmp_path / "out.pth", to="torch-ema", names=names)
        assert "the input has no decay; 0.9999 is written; give decay= for another" in done.notes
        assert polyak.read(tmp_path / "out.pth", names=names).decay == 0.9999
        polyak.convert(case.path, tmp_path / "out.pth", to="torch-ema", names=names, decay=0.5)
        assert polyak.read(tmp_path / "out.pth", names=names).decay == 0.5

    @pytest.mark.parametrize("count", [float("nan"), float("inf"), -1])
    def test_a_number_of_updates_that_is_none(self, tmp_path, count):
        content = {"decay": 0.9, "num_updates": count, "shadow_params": [torch.ones(2)], "collected_params": None}
        torch.save(content, tmp_path / "in.pth")
        done = polyak.convert(tmp_path / "in.pth", tmp_path / "out.pth", to="torch-ema", names=["w"])
        assert "num_updates is None: from now on the decay is constant, without a warm-up" in done.notes

    def test_a_layout_without_names_has_parameters_only(self, tmp_path):
        case = cases.torch_ema(tmp_path)
        names = [name for name, _ in case.model.named_parameters()]
        done = polyak.convert(case.path, tmp_path / "out.pth", to="plain", names=names)
        assert any(
            "the input has parameters only, each under one name: buffers and tied" in note for note in done.notes
        )
        assert list(torch.load(tmp_path / "out.pth", weights_only=True)) == names

    def test_what_has_no_place_is_told(self, tmp_path):
        case = cases.export(tmp_path)
        done = polyak.convert(case.path, tmp_path / "out.pth", to="plain")
        assert done.notes == ("plain files cannot hold: number of updates (3), decay (0.9)",)
        average = polyak.WeightAverage(zoo.mlp(), polyak.Uniform())
        with pytest.warns(UserWarning, match="after 0 updates"):
            average.export(tmp_path / "uniform.safetensors")
        done = polyak.convert(tmp_path / "uniform.safetensors", tmp_path / "out.pt", to="torch")
        assert "torch files cannot hold: profile (Uniform())" in done.notes
        with_decay = polyak.convert(tmp_path / "uniform.safetensors", tmp_path / "out.pt", to="torch", decay=0.5)
        assert "torch files cannot hold: decay (0.5), profile (Uniform())" in with_decay.notes
        done = polyak.convert(case.path, tmp_path / "out.safetensors", to="safetensors")
        assert done.notes == ()
        with safe_open(tmp_path / "out.safetensors", "pt") as file:
            assert (file.metadata()["num_updates"], file.metadata()["time"]) == ("3", "3.0")


@pytest.mark.protects
def test_a_profile_that_an_export_cannot_have_is_told(tmp_path):
    """The metadata of an export have a time and a number of updates, too, which EDM2 does not keep."""
    network = zoo.mlp().state_dict()
    training = {"net": network, "ema": {"stds": [0.05], "emas": [network]}, "state": {"cur_nimg": 64}}
    torch.save(training, tmp_path / "training-state.pt")
    done = polyak.convert(tmp_path / "training-state.pt", tmp_path / "out.safetensors", to="safetensors")
    assert "safetensors files cannot hold: profile (Power(relative_std=0.05)), raw weights" in done.notes
    assert polyak.read(tmp_path / "out.safetensors").profiles == {}


def test_a_positional_layout_stays_positional_without_names(tmp_path):
    case = cases.torch_ema(tmp_path)
    polyak.convert(case.path, tmp_path / "out.pth", to="torch-ema", dtype=torch.float64)
    before, after = (torch.load(path, weights_only=True) for path in (case.path, tmp_path / "out.pth"))
    assert (after["decay"], after["num_updates"]) == (before["decay"], before["num_updates"]) == (0.9, 3)
    for key in ("shadow_params", "collected_params"):
        assert [tensor.dtype for tensor in after[key]] == [torch.float64] * len(before[key])
        assert all(torch.equal(one.double(), other) for one, other in zip(before[key], after[key], strict=True))


def test_a_module_of_a_trainer_has_the_model_in_it(tmp_path):
    case = cases.timm(tmp_path)
    outer = nn.Module()
    outer.net = zoo.batchnorm()
    polyak.convert(case.path, tmp_path / "out.ckpt", to="lightning", model=outer)
    loaded = torch.load(tmp_path / "out.ckpt", weights_only=True)
    outer.load_state_dict(loaded["state_dict"])
    assert zoo.bit_equal(outer.net.state_dict(), case.average)


def test_one_of_several_averages(tmp_path):
    model = zoo.mlp()
    average = polyak.WeightAverage(model, {"short": polyak.Exponential(0.5), "long": polyak.Exponential(0.9)})
    cases.train(model, average.update)
    torch.save(average.state_dict(), tmp_path / "state.pt")
    with pytest.raises(polyak.FileFormatError, match=r"has several averages, 'short', 'long'; choose one by average="):
        polyak.convert(tmp_path / "state.pt", tmp_path / "out.pth", to="plain")
    with pytest.raises(
        polyak.FileFormatError, match=r"average='mean' is not in .*state.pt', which has 'short', 'long'"
    ):
        polyak.convert(tmp_path / "state.pt", tmp_path / "out.pth", to="plain", average="mean")
    polyak.convert(tmp_path / "state.pt", tmp_path / "out.pth", to="plain", average="short")
    assert zoo.bit_equal(torch.load(tmp_path / "out.pth"), average["short"].weights())


def test_large_folders_have_several_files_and_an_index(tmp_path):
    case = cases.timm(tmp_path)
    polyak.convert(case.path, tmp_path / "out", to="diffusers", config=cases.config(tmp_path), max_shard_bytes=200)
    index = json.loads((tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == case.average.keys()
    assert set(index["weight_map"].values()) | {"config.json"} < set(contents(tmp_path / "out"))
    assert zoo.bit_equal(dict(polyak.read(tmp_path / "out").average), case.average)


def test_a_configuration_goes_along(tmp_path):
    case = cases.timm(tmp_path)
    done = polyak.convert(case.path, tmp_path / "bare", to="huggingface")
    assert "there is no config.json, which from_pretrained() looks for: put the model's there" in done.notes
    assert contents(tmp_path / "bare") == ["model.safetensors"]
    polyak.convert(case.path, tmp_path / "full", to="huggingface", config=cases.config(tmp_path))
    polyak.convert(tmp_path / "full", tmp_path / "more", to="diffusers")
    found = json.loads((tmp_path / "more" / "config.json").read_text())
    assert (found["_class_name"], found["width"], found["decay"]) == ("Net", 4, 0.9999)


def test_an_adapter_is_no_model(tmp_path):
    folder = library_files.FILES / "peft" / library_files.case("peft")[0]["path"]
    with pytest.raises(
        polyak.FileFormatError, match="is an adapter, and its base is not in it; convert it to 'safetensors'"
    ):
        polyak.convert(folder, tmp_path / "out", to="huggingface")


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"to": "keras"}, ValueError, r"to='keras' is unknown; there are safetensors, plain, huggingface, timm, "),
            (
                {"to": "safetensors"},
                ValueError,
                r"to='safetensors' writes a file of safetensors; name it .safetensors .*out.pth'",
            ),
            ({"to": "diffusers"}, ValueError, r"to='diffusers' writes a folder; do not name it .pth .*out.pth'"),
            ({"to": "torch-ema"}, polyak.MismatchError, r"9 names in .*last.pth.tar' do not tell which are parameters"),
            (
                {"to": "torch-ema", "names": ["0.weight", "x"]},
                polyak.MismatchError,
                r"last.pth.tar' has no 'x'; the names must be those of what it averages",
            ),
            ({"to": "plain", "dtype": torch.int8}, ValueError, r"floating-point tensors cannot be cast to torch.int8"),
            ({"to": "plain", "dtype": "bfloat16"}, TypeError, r"dtype='bfloat16': a torch.dtype is needed"),
            ({"to": "plain", "decay": 2.0}, ValueError, r"decay=2.0 must be between 0 and 1"),
            ({"to": "plain", "max_shard_bytes": 0}, ValueError, r"max_shard_bytes=0 must be positive"),
            (
                {"to": "plain", "model": zoo.mlp()},
                polyak.MismatchError,
                r"average 'average' in .* has '1.weight', .* and the model has '2.weight'",
            ),
        ],
    )
    def test_arguments(self, arguments, error, message, tmp_path):
        case = cases.timm(tmp_path)
        with pytest.raises(error, match=message):
            polyak.convert(case.path, tmp_path / "out.pth", **arguments)
        assert contents(tmp_path) == ["last.pth.tar"]

    def test_a_name_that_promises_safetensors(self, tmp_path):
        case = cases.timm(tmp_path)
        with pytest.raises(ValueError, match=r"to='timm' writes a file of torch.save; do not name it .safetensors"):
            polyak.convert(case.path, tmp_path / "out.safetensors", to="timm")

    @pytest.mark.protects
    def test_the_input_as_output(self, tmp_path):
        case = cases.timm(tmp_path)
        before = case.path.read_bytes()
        (tmp_path / "link").symlink_to(case.path)
        for output in (case.path, tmp_path / "." / "last.pth.tar", tmp_path / "link"):
            with pytest.raises(ValueError, match="is the input or in it, and would be written while it is read"):
                polyak.convert(case.path, output, to="timm")
        assert case.path.read_bytes() == before
        polyak.convert(case.path, tmp_path / "folder", to="huggingface")
        with pytest.raises(ValueError, match="is the input or in it"):
            polyak.convert(tmp_path / "folder", tmp_path / "folder" / "model.safetensors", to="safetensors")

    def test_a_link_to_itself_as_output(self, tmp_path):
        case = cases.timm(tmp_path)
        (tmp_path / "loop.pth").symlink_to(tmp_path / "loop.pth")
        with pytest.raises(OSError, match=r"loop.pth' cannot be written: it is a link that leads to itself"):
            polyak.convert(case.path, tmp_path / "loop.pth", to="plain")

    def test_a_name_twice(self, tmp_path):
        case = cases.timm(tmp_path)
        with pytest.raises(polyak.MismatchError, match=r"the names have '0.weight' more than once"):
            polyak.convert(case.path, tmp_path / "out.pth", to="torch-ema", names=["0.weight", "0.weight"])
        assert contents(tmp_path) == ["last.pth.tar"]

    @pytest.mark.protects
    def test_the_raw_weights_of_the_input_as_output(self, tmp_path):
        case = cases.timm(tmp_path)
        nemo = {"state_dict": case.average, "optimizer_states": [{"ema": [], "decay": 0.9}]}
        torch.save(nemo, tmp_path / "last-EMA.ckpt")
        torch.save({"state_dict": case.raw}, tmp_path / "last.ckpt")
        with pytest.raises(ValueError, match=r"last.ckpt' has weights that .*last-EMA.ckpt' goes with; choose another"):
            polyak.convert(tmp_path / "last-EMA.ckpt", tmp_path / "last.ckpt", to="lightning")

    def test_a_folder_that_is_not_empty(self, tmp_path):
        case = cases.timm(tmp_path)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").touch()
        with pytest.raises(FileExistsError, match="out' cannot be written: there is a folder with 1 entry"):
            polyak.convert(case.path, tmp_path / "out", to="huggingface")
        assert contents(tmp_path / "out") == ["mine.txt"]

    def test_a_file_without_an_average(self, tmp_path):
        torch.save({"model": zoo.mlp().state_dict(), "epoch": 1}, tmp_path / "in.pth")
        with pytest.raises(polyak.FileFormatError, match=r"in.pth' has no average, but only raw weights"):
            polyak.convert(tmp_path / "in.pth", tmp_path / "out.pth", to="plain")

    def test_positions_without_names(self, tmp_path):
        case = cases.torch_ema(tmp_path)
        with pytest.raises(
            polyak.MismatchError, match=r"shadow.pt' have no names, but positions; give model=, or names="
        ):
            polyak.convert(case.path, tmp_path / "out.pth", to="plain")

    @pytest.mark.protects
    def test_a_weight_called_names_is_no_lack_of_names(self, tmp_path):
        average, names = {"weight": torch.ones(2)}, torch.zeros(3)
        torch.save({"state_dict_ema": average, "state_dict": {**average, "names": names}}, tmp_path / "in.pth")
        done = polyak.convert(tmp_path / "in.pth", tmp_path / "out.pth", to="plain")
        assert done.notes[0] == "not averaged, and as in the raw weights: 'names'"
        assert torch.load(tmp_path / "out.pth").keys() == {"weight", "names"}

    def test_diffusers_without_a_configuration(self, tmp_path):
        case = cases.timm(tmp_path)
        with pytest.raises(polyak.FileFormatError, match=r"has no config.json, without which diffusers cannot make"):
            polyak.convert(case.path, tmp_path / "out", to="diffusers")
        for text, message in (("[1]", "holds no dictionary"), ("{", "is no JSON"), ("[" * 100_000, "is no JSON")):
            (tmp_path / "bad.json").write_text(text)
            with pytest.raises(polyak.FileFormatError, match=f"bad.json' {message}, and the configuration of a model"):
                polyak.convert(case.path, tmp_path / "out", to="diffusers", config=tmp_path / "bad.json")

    @pytest.mark.protects
    def test_an_output_that_was_there_stays_when_writing_fails(self, tmp_path, monkeypatch):
        case = cases.timm(tmp_path)
        (tmp_path / "out.pth").write_bytes(b"before")
        monkeypatch.setattr("torch.save", lambda *_: (_ for _ in ()).throw(RuntimeError("full")))
        with pytest.raises(RuntimeError, match="full"):
            polyak.convert(case.path, tmp_path / "out.pth", to="timm")
        assert contents(tmp_path) == ["last.pth.tar", "out.pth"]
        assert (tmp_path / "out.pth").read_bytes() == b"before"


def test_the_account(tmp_path):
    case = cases.timm(tmp_path)
    done = polyak.convert(case.path, tmp_path / "out.pth", to="torch")
    assert str(done).splitlines() == [
        f"{case.path}: timm, average 'average'",
        f"{tmp_path / 'out.pth'}: torch, 9 tensors, 580 bytes",
        "  the input has no number of updates; n_averaged is set to 1: at 0 the next update would "
        "overwrite the average",
        "  torch files cannot hold: raw weights",
    ]
    again = polyak.convert(case.path, tmp_path / "out.pth", to="torch")
    assert again.notes == (*done.notes, "the file that was there is replaced")


def test_damage_does_not_get_new_checksums(tmp_path):
    torch.save({"state_dict_ema": {"w": torch.ones(100)}}, tmp_path / "x.pth")
    data = bytearray((tmp_path / "x.pth").read_bytes())
    data[data.index(torch.ones(4).numpy().tobytes()) + 2] ^= 1
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(polyak.FileFormatError, match=r"x.pth' is damaged: the record 'x/data/0': .* take another copy"):
        polyak.convert(tmp_path / "x.pth", tmp_path / "y.pth", to="plain")
    assert not (tmp_path / "y.pth").exists()
