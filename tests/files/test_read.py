"""Files that real libraries wrote, against what these libraries held in memory when they wrote them."""

import copy
import pickle
import re
import warnings

import pytest
import torch
from safetensors.torch import save_file

import polyak
import zoo
from library_files import CASES, FILES, case
from polyak.files.layouts import LAYOUTS


def read(name, **options):
    about, _, _ = case(name)
    if about.get("positional"):
        options = {"names": about["names"], **options}
    return polyak.read(FILES / name / about["path"], **options)


@pytest.mark.protects
@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_what_the_library_held(name):
    about, averages, raw = case(name)
    checkpoint = read(name)
    assert checkpoint.format == about["format"]
    assert checkpoint.averages.keys() == averages.keys()
    for average, tensors in averages.items():
        assert zoo.bit_equal(dict(checkpoint.averages[average]), tensors)
    assert zoo.bit_equal(dict(checkpoint.raw_weights or {}), raw)
    assert about["counters"].items() <= checkpoint.counters.items()
    assert checkpoint.decay == about["decay"]


@pytest.mark.parametrize("name", CASES)
def test_the_format_can_be_forced(name):
    about, averages, _ = case(name)
    assert read(name, format=about["format"]).averages.keys() == averages.keys()


def test_each_layout_has_a_file_or_a_test_of_its_own():
    tested = {case(name)[0]["format"] for name in CASES}
    written_here = {"basicsr", "dino", "key", "weights", "olmo-core", "edm2-traditional", "list"}
    written_here |= {"accelerate-folder"}
    assert {layout.name for layout in LAYOUTS} - tested - written_here == set()


def doubled(tensors):
    return {name: 2 * tensor for name, tensor in tensors.items()}


@pytest.fixture
def weights():
    return {"layer.weight": torch.randn(2, 3), "layer.bias": torch.randn(2)}


def save(tmp_path, content, name="checkpoint.pth"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


class TestLayoutsWithoutAFile:
    def test_basicsr(self, tmp_path, weights):
        checkpoint = polyak.read(save(tmp_path, {"params": doubled(weights), "params_ema": weights}))
        assert checkpoint.format == "basicsr"
        assert zoo.bit_equal(dict(checkpoint.average), weights)

    def test_dino(self, tmp_path, weights):
        teacher = {f"module.{name}": tensor for name, tensor in weights.items()}
        checkpoint = polyak.read(save(tmp_path, {"student": doubled(teacher), "teacher": teacher, "epoch": 4}))
        assert (checkpoint.format, checkpoint.counters) == ("dino", {"epoch": 4})
        assert zoo.bit_equal(dict(checkpoint.average), weights)
        assert zoo.bit_equal(dict(checkpoint.raw_weights), doubled(weights))

    def test_a_key_of_ones_own(self, tmp_path, weights):
        checkpoint = polyak.read(save(tmp_path, {"model": doubled(weights), "ema_net": weights, "step": 7}))
        assert (checkpoint.format, checkpoint.counters) == ("key", {"step": 7})
        assert zoo.bit_equal(dict(checkpoint.average), weights)
        assert zoo.bit_equal(dict(checkpoint.raw_weights), doubled(weights))

    def test_several_keys_of_ones_own(self, tmp_path, weights):
        content = {"model": weights, "ema_0.99": weights, "ema_0.999": doubled(weights)}
        checkpoint = polyak.read(save(tmp_path, content))
        assert sorted(checkpoint.averages) == ["ema_0.99", "ema_0.999"]
        with pytest.raises(polyak.FileFormatError, match=r"has several averages, 'ema_0.99', 'ema_0.999'; choose one"):
            _ = checkpoint.average
        with pytest.raises(
            polyak.FileFormatError, match=r"pth' has several averages, 'ema_0.99', 'ema_0.999'; choose one"
        ):
            checkpoint.weights()
        with pytest.raises(
            polyak.FileFormatError, match=r"average='ema' is not in .*, which has 'ema_0.99', 'ema_0.999'"
        ):
            checkpoint.weights("ema")
        assert zoo.bit_equal(checkpoint.weights("ema_0.99"), weights)

    def test_no_average(self, tmp_path, weights):
        checkpoint = polyak.read(save(tmp_path, {"state_dict": weights, "epoch": 1}))
        assert (checkpoint.format, dict(checkpoint.averages)) == ("weights", {})
        assert zoo.bit_equal(dict(checkpoint.raw_weights), weights)
        with pytest.raises(polyak.FileFormatError, match=r"has no average, but only raw weights"):
            _ = checkpoint.average

    def test_the_other_training_state_of_edm2(self, tmp_path, weights):
        content = {"state": {"cur_nimg": 4096}, "net": doubled(weights), "ema": weights}
        checkpoint = polyak.read(save(tmp_path, content, "training-state-0000004.pt"))
        assert (checkpoint.format, checkpoint.counters) == ("edm2-traditional", {"cur_nimg": 4096})
        assert zoo.bit_equal(dict(checkpoint.average), weights)

    def test_olmo_core(self, tmp_path, weights):
        import torch.distributed.checkpoint as dcp

        folder = tmp_path / "step5-merged" / "model_and_optim"
        with pytest.warns(UserWarning, match="single process"):
            dcp.save({"model": weights, "optim": {"state": doubled(weights)}}, checkpoint_id=folder)
        checkpoint = polyak.read(folder)
        assert (checkpoint.format, checkpoint.counters) == ("olmo-core", {"step": 5})
        assert zoo.bit_equal(dict(checkpoint.average), weights)

    def test_composer_swa(self, tmp_path, weights):
        wrapped = {f"module.{name}": tensor for name, tensor in weights.items()}
        kept = {"swa_model": {"n_averaged": torch.tensor(3), **wrapped}, "swa_completed": False, "step_counter": 9}
        state = {"model": doubled(weights), "algorithms": [("LabelSmoothing", {"repr": ""}), ("SWA", kept)]}
        checkpoint = polyak.read(save(tmp_path, {"state": state, "rng": []}))
        assert (checkpoint.format, checkpoint.counters) == ("composer-swa", {"n_averaged": 3, "step_counter": 9})
        assert zoo.bit_equal(dict(checkpoint.average), weights)


class TestWhichLayout:
    def test_two_that_fit_are_named(self, tmp_path, weights):
        path = save(tmp_path, {"state_dict": weights, "state_dict_ema": weights, "ema_state": weights})
        with pytest.raises(
            polyak.FileFormatError,
            match=r"checkpoint.pth' could be of several formats: 'timm' and 'd2go'; choose one by format=",
        ):
            polyak.read(path)
        assert polyak.read(path, format="d2go").format == "d2go"

    def test_none_that_fits(self, tmp_path):
        with pytest.raises(polyak.FileFormatError, match=r"x.pt' is of no known format; it has 'optimizer', 'epoch'"):
            polyak.read(save(tmp_path, {"optimizer": {"state": {}}, "epoch": 3}, "x.pt"))
        with pytest.raises(polyak.FileFormatError, match=r"is not of the format 'timm'; it has 'model'"):
            polyak.read(save(tmp_path, {"model": {"a": torch.ones(1)}}), format="timm")
        with pytest.raises(polyak.FileFormatError, match=r"format='tim' is unknown; there are timm, timm-module, "):
            polyak.read(save(tmp_path, {"model": {"a": torch.ones(1)}}), format="tim")

    def test_under_a_key_of_ones_own(self, tmp_path, weights):
        """What libraries give by state_dict(), people keep in dictionaries of their own."""
        averaged = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(3, 2))
        content = {"net": torch.nn.Linear(3, 2).state_dict(), "my_average": averaged.state_dict(), "step": 3}
        checkpoint = polyak.read(save(tmp_path, content))
        assert (checkpoint.format, checkpoint.counters) == ("torch", {"step": 3, "n_averaged": 0})
        assert "found under 'my_average'" in checkpoint.notes
        assert zoo.bit_equal(dict(checkpoint.average), averaged.module.state_dict())
        assert zoo.bit_equal(dict(checkpoint.raw_weights), content["net"])

    @pytest.mark.parametrize("key", ["state_dict", None])
    def test_within_a_module_that_holds_the_average(self, tmp_path, key):
        class Trained(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.net = torch.nn.Linear(3, 2)
                self.smooth = torch.optim.swa_utils.AveragedModel(self.net)

        module = Trained()
        zoo.drift(module)
        state = module.state_dict()
        checkpoint = polyak.read(save(tmp_path, {key: state, "epoch": 3} if key else state))
        assert checkpoint.format == "torch"
        assert zoo.bit_equal(dict(checkpoint.average), module.smooth.module.state_dict())
        assert zoo.bit_equal(dict(checkpoint.raw_weights), module.net.state_dict())
        assert "the raw weights are those of the part 'net'" in checkpoint.notes

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            (
                {"net": {}, "ema": {"stds": ["wide"], "emas": [{"w": torch.ones(1)}]}},
                "is damaged: it has no standard deviation for its average '0'",
            ),
            (
                {
                    "model": {"w": torch.ones(1)},
                    "optimizer": {"state": {0: {"z": 1}}, "param_groups": [{"train_mode": True}]},
                },
                "is damaged: a group of its optimizer has no beta",
            ),
        ],
    )
    def test_whatever_is_wrong_names_the_file(self, content, match, tmp_path):
        with pytest.raises(polyak.FileFormatError, match=f"^'.*x.pth' {match}"):
            polyak.read(save(tmp_path, content, "x.pth"))

    def test_a_neighbour_that_is_damaged(self, tmp_path, weights):
        save(tmp_path, {"state_dict": weights, "optimizer_states": [{"ema": []}]}, "last-EMA.ckpt")
        (tmp_path / "last.ckpt").write_bytes(b"PK")
        checkpoint = polyak.read(tmp_path / "last-EMA.ckpt")
        assert checkpoint.raw_weights is None
        assert checkpoint.notes[0].startswith("no raw weights, for 'last.ckpt' beside it cannot be read: ")

    def test_a_neighbour_with_objects(self, tmp_path, weights):
        save(tmp_path, {"state_dict": weights, "optimizer_states": [{"ema": []}]}, "last-EMA.ckpt")
        save(tmp_path, {"state_dict": weights, "made": zoo.TiedTransformer()}, "last.ckpt")
        note = polyak.read(tmp_path / "last-EMA.ckpt").notes[0]
        assert note.needs == ("skip_objects", "run_pickled_code")
        assert "skip_objects=True reads" in note
        assert "skip_objects" not in note.text

    def test_a_new_layout_is_a_row(self, tmp_path, weights):
        from polyak.files.containers import open_content
        from polyak.files.layouts.examination import find_layout
        from polyak.files.layouts.layout import Layout

        row = Layout(
            name="made-up",
            writer="nobody",
            average=("smooth.{}.weights/of_*",),
            raw=("rough/*",),
            counters=("progress/steps",),
            decay="smoothness",
        )
        given = {f"of_{name}": tensor for name, tensor in weights.items()}
        content = {
            "smooth.long.weights": given,
            "smooth.short.weights": doubled(given),
            "rough": weights,
            "progress": {"steps": 12},
            "smoothness": 0.5,
        }
        path = save(tmp_path, content)
        found = find_layout(open_content(path), open_beside=open_content, layouts=(*LAYOUTS, row))
        assert (found.layout.name, found.counters, found.decay) == ("made-up", {"steps": 12}, 0.5)
        assert {name: sorted(average) for name, average in found.averages.items()} == {
            "long": sorted(weights),
            "short": sorted(weights),
        }
        with pytest.raises(polyak.FileFormatError, match="of no known format"):
            polyak.read(path)


class TestNeeds:
    """What would help is data: the library and the command line each say it in their words."""

    def test_an_error(self, tmp_path, weights):
        path = save(
            tmp_path, {"state_dict_ema": weights, "ema_state": weights, "model": weights, "state_dict": weights}
        )
        with pytest.raises(polyak.FileFormatError) as raised:
            polyak.read(path)
        for error in (raised.value, pickle.loads(pickle.dumps(raised.value)), raised.value.inside("it")):
            assert error.needs == ("format",)
            assert str(error) == f"{error.text}; choose one by format="
            assert "format=" not in error.text

    def test_an_argument(self, tmp_path, weights):
        with pytest.raises(polyak.FileFormatError) as raised:
            polyak.read(save(tmp_path, weights), format="tim")
        assert (raised.value.argument, raised.value.text[:18]) == ("format", "'tim' is unknown; ")

    def test_a_note(self):
        (note,) = [one for one in polyak.read(FILES / "torch-ema" / case("torch-ema")[0]["path"]).notes if one.needs]
        for each in (note, copy.deepcopy(note)):
            assert (each.text, each.needs) == ("its tensors have no names, but positions", ("model", "names"))
            assert each == f"{each.text}; give model=, or names= in the order of model.parameters()"

    @pytest.mark.protects
    def test_several_keys(self, tmp_path, weights):
        content = {"a": {"n_averaged": 0}, "b": {"n_averaged": 0}}
        for averaged in content.values():
            averaged |= {f"module.{name}": tensor for name, tensor in weights.items()}
        checkpoint = polyak.read(save(tmp_path, content))
        assert checkpoint.averages.keys() == {"a", "b"}
        assert checkpoint.notes == ("nothing was averaged yet when it was saved",)
        del content["b"]
        assert "found under 'a'" in polyak.read(save(tmp_path, content)).notes


class TestUpdates:
    def test_each_counter_of_updates_is_among_the_counters(self):
        for layout in LAYOUTS:
            names = {re.split(r"[/.]", counter)[-1] for counter in layout.counters}
            names |= set(layout.about) | set(re.findall(r"\?P<(\w+)>", layout.file or ""))
            assert layout.updates is None or layout.updates in names
            assert layout.updates is not None or not (layout.begins_with_copy or layout.warms_up)

    @pytest.mark.parametrize("count", [0, 1])
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("swa.pth", {"n_averaged": 0}),
            ("ema.pt", {"initted": torch.tensor(False), "step": 0}),
            ("last-EMA.ckpt", {"optimizer_states": [{"ema": [], "current_step": 0}]}),
        ],
    )
    def test_an_average_without_updates_is_noted(self, tmp_path, name, content, count):
        path = {"swa.pth": "module.", "ema.pt": "ema_model."}.get(name, "")
        weights = {f"{path}weight": torch.ones(2)}
        content = copy.deepcopy(content)
        if name == "last-EMA.ckpt":
            content["optimizer_states"][0]["current_step"] = count
            content["state_dict"] = weights
        else:
            counter = list(content)[-1]
            content |= {counter: torch.tensor(count), **weights}
        checkpoint = polyak.read(save(tmp_path, content, name))
        assert ("nothing was averaged yet when it was saved" in checkpoint.notes) == (count == 0)


class TestNames:
    def test_positions_need_names(self):
        checkpoint = polyak.read(FILES / "torch-ema" / case("torch-ema")[0]["path"])
        assert (checkpoint.has_names, checkpoint.missing) == (False, ())
        assert sorted(checkpoint.average, key=int) == [str(place) for place in range(len(checkpoint.average))]
        assert (
            "its tensors have no names, but positions; give model=, or names= in the order of model.parameters()"
            in (checkpoint.notes)
        )

    @pytest.mark.protects
    def test_a_weight_may_be_called_names(self, tmp_path, weights):
        path = save(tmp_path, {"state_dict_ema": weights, "state_dict": {**weights, "names": torch.ones(3)}})
        checkpoint = polyak.read(path)
        assert (checkpoint.has_names, checkpoint.missing) == (True, ("names",))
        model = torch.nn.Sequential()
        model.layer = torch.nn.Linear(3, 2)
        model.names = torch.nn.Parameter(torch.ones(3))
        assert polyak.read(path, model=model).missing == ("names",)
        model.names = torch.nn.Parameter(torch.ones(2))
        with pytest.raises(polyak.MismatchError, match=r"'names' of what was trained in .* is \(3,\), and \(2,\) in"):
            polyak.read(path, model=model)

    def test_as_many_names_as_tensors(self, tmp_path):
        content = {"decay": 0.9, "num_updates": 3, "shadow_params": [torch.ones(1)] * 2, "collected_params": None}
        with pytest.raises(
            polyak.MismatchError,
            match=r"checkpoint.pth' has 2 tensors without names, and there are 1 names for them: 'a'. Give the",
        ):
            polyak.read(save(tmp_path, content), names=["a"])
        with pytest.raises(polyak.MismatchError, match="the names have 'a' more than once"):
            polyak.read(save(tmp_path, content), names=["a", "a"])
        with pytest.raises(TypeError, match="names: a list of names of parameters is needed"):
            polyak.read(save(tmp_path, content), names="ab")
        with pytest.raises(ValueError, match="names= and model= are both given"):
            polyak.read(save(tmp_path, content), names=["a", "b"], model=zoo.mlp())

    def test_a_model_gives_them(self, tmp_path):
        torch_ema = pytest.importorskip("torch_ema")
        model = zoo.TiedTransformer()
        ema = torch_ema.ExponentialMovingAverage(model.parameters(), decay=0.5)
        zoo.drift(model)
        ema.update()
        checkpoint = polyak.read(save(tmp_path, {"ema": ema.state_dict()}), model=model)
        with ema.average_parameters():
            named = dict(model.named_parameters(remove_duplicate=False))
            assert zoo.bit_equal(dict(checkpoint.average), named)

    @pytest.mark.protects
    @pytest.mark.parametrize("when", ["before", "inside", "after"])
    def test_what_torch_ema_keeps_of_a_swap_is_not_what_is_trained(self, tmp_path, when):
        torch_ema = pytest.importorskip("torch_ema")
        model = zoo.TiedTransformer()
        next(model.parameters()).requires_grad_(False)
        ema = torch_ema.ExponentialMovingAverage(model.parameters(), decay=0.5)

        def train():
            zoo.drift(model)
            ema.update()
            return zoo.clone(dict(model.named_parameters(remove_duplicate=False)))

        def save_here(name):
            return save(tmp_path, {"model": model.state_dict(), "ema": ema.state_dict()}, name)

        raw, paths = train(), {"before": save_here("before.pth")}
        expected = {"before": raw, "inside": raw}
        with ema.average_parameters():
            paths["inside"] = save_here("inside.pth")
        expected["after"] = train()
        paths["after"] = save_here("after.pth")
        checkpoint = polyak.read(paths[when], model=model)
        trained = {name: tensor for name, tensor in expected[when].items() if name in checkpoint.raw_weights}
        assert trained.keys() >= checkpoint.average.keys()
        assert zoo.bit_equal({name: checkpoint.raw_weights[name] for name in trained}, trained)
        assert any("when the average was last put" in note for note in checkpoint.notes) == (when == "inside")

    def test_a_model_without_values_has_names_enough(self, tmp_path):
        with torch.device("meta"):
            model = zoo.TiedTransformer()
        shapes = [parameter.shape for parameter in model.parameters()]
        content = {"shadow_params": [torch.randn(shape) for shape in shapes], "num_updates": 1, "decay": 0.9}
        average = polyak.read(save(tmp_path, content), model=model).average
        assert average.keys() == dict(model.named_parameters(remove_duplicate=False)).keys()
        assert zoo.bit_equal(
            dict(enumerate(content["shadow_params"])),
            {i: average[name] for i, (name, _) in enumerate(model.named_parameters())},
        )

    def test_only_the_trained_ones_may_be_averaged(self, tmp_path):
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        model[0].requires_grad_(False)
        content = {"shadow_params": [torch.ones(2, 2), torch.ones(2)], "num_updates": 1, "decay": 0.9}
        checkpoint = polyak.read(save(tmp_path, content), model=model)
        assert sorted(checkpoint.average) == ["1.bias", "1.weight"]
        assert checkpoint.missing == ("0.weight", "0.bias")

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
    def test_wrappers_leave_no_trace(self, tmp_path, weights, prefix):
        wrapped = {f"{prefix}{name}": tensor for name, tensor in weights.items()}
        checkpoint = polyak.read(save(tmp_path, {"state_dict_ema": wrapped, "state_dict": wrapped}))
        assert checkpoint.average.keys() == weights.keys() == checkpoint.raw_weights.keys()
        assert "names without what wrappers put in them" in checkpoint.notes

    def test_a_model_inside_of_a_trainers_module(self, tmp_path, weights):
        model = torch.nn.Sequential()
        model.layer = torch.nn.Linear(3, 2)
        inside = {f"net.{name}": tensor for name, tensor in weights.items()}
        content = {"state_dict_ema": {**inside, "loss.weight": torch.ones(3)}, "state_dict": inside}
        checkpoint = polyak.read(save(tmp_path, content), model=model)
        model.load_state_dict(checkpoint.average)
        assert zoo.bit_equal(model.state_dict(), weights)

    def test_another_model(self, tmp_path, weights):
        path = save(tmp_path, {"state_dict_ema": weights})
        with pytest.raises(
            polyak.MismatchError, match=r"has 'layer.weight', 'layer.bias', and the model has '0.weight'"
        ):
            polyak.read(path, model=zoo.mlp())
        model = torch.nn.Sequential()
        model.layer = torch.nn.Linear(1, 2)
        with pytest.raises(
            polyak.MismatchError, match=r"'layer.weight' of average 'average' in .* is \(2, 3\), and \(2, 1\)"
        ):
            polyak.read(path, model=model)

    def test_lost_dots_that_nobody_can_find_again(self, tmp_path):
        kept = {"model.a.bc": torch.ones(1), "model.ab.c": torch.ones(1), "model.d.e": torch.ones(1)}
        averages = {"model_ema.abc": torch.zeros(1), "model_ema.de": torch.zeros(1)}
        counters = {"model_ema.decay": torch.tensor(0.5), "model_ema.num_updates": torch.tensor(3, dtype=torch.int32)}
        checkpoint = polyak.read(save(tmp_path, {"state_dict": {**kept, **averages, **counters}}))
        assert (checkpoint.format, checkpoint.decay, checkpoint.counters["num_updates"]) == ("litema", 0.5, 3)
        assert (list(checkpoint.average), sorted(checkpoint.missing)) == (["model.d.e"], ["model.a.bc", "model.ab.c"])
        assert "left out, for several weights share one average: 'model.a.bc', 'model.ab.c'" in checkpoint.notes


class TestTensors:
    def test_they_share_memory_where_they_do_in_the_file(self, tmp_path):
        weight = torch.randn(3, 4)
        path = save(tmp_path, {"state_dict_ema": {"a": weight, "b": weight, "c": weight.t(), "d": weight[1:]}})
        average = polyak.read(path).average
        assert zoo.bit_equal(dict(average), {"a": weight, "b": weight, "c": weight.t(), "d": weight[1:]})
        assert len({tensor.untyped_storage().data_ptr() for tensor in average.values()}) == 1
        assert average["c"].stride() == weight.t().stride()

    @pytest.mark.protects
    def test_writing_to_them_leaves_the_file_as_it_is(self, tmp_path, weights):
        path = save(tmp_path, {"state_dict_ema": weights})
        before = path.read_bytes()
        average = polyak.read(path).average
        for tensor in average.values():
            tensor.zero_()
        assert path.read_bytes() == before
        assert zoo.bit_equal(dict(polyak.read(path).average), weights)

    def test_saving_one_of_them_saves_no_more_than_it(self, tmp_path):
        path = save(tmp_path, {"state_dict_ema": {"small": torch.ones(1), "large": torch.ones(100_000)}})
        torch.save(polyak.read(path).average["small"], tmp_path / "small.pt")
        assert (tmp_path / "small.pt").stat().st_size < 5_000

    @pytest.mark.parametrize("legacy", [False, True])
    def test_every_dtype(self, tmp_path, legacy):
        names = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64", "complex128"]
        names += ["int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool"]
        tensors = {name: torch.arange(5).to(getattr(torch, name)) for name in names}
        tensors |= {
            "scalar": torch.tensor(3.0),
            "empty": torch.empty(0, 3),
            "parameter": torch.nn.Parameter(torch.ones(2)),
        }
        path = tmp_path / "x.pth"
        torch.save({"state_dict_ema": tensors}, path, _use_new_zipfile_serialization=not legacy)
        average = polyak.read(path).average
        for name, tensor in tensors.items():
            assert average[name].dtype == tensor.dtype
            assert average[name].view(torch.uint8).equal(tensor.detach().view(torch.uint8)) if tensor.dim() else True
            assert average[name].shape == tensor.shape
        assert average["scalar"].item() == 3.0

    def test_safetensors(self, tmp_path, weights):
        save_file({**weights, "empty": torch.empty(0)}, tmp_path / "x.safetensors")
        checkpoint = polyak.read(tmp_path / "x.safetensors")
        assert checkpoint.format == "plain"
        assert zoo.bit_equal(dict(checkpoint.average), {**weights, "empty": torch.empty(0)})

    def test_weights_completes_the_average(self, tmp_path, weights):
        raw = {**doubled(weights), "steps": torch.tensor(4)}
        checkpoint = polyak.read(save(tmp_path, {"state_dict_ema": weights, "state_dict": raw}))
        assert checkpoint.missing == ("steps",)
        assert zoo.bit_equal(checkpoint.weights(), {**weights, "steps": torch.tensor(4)})


def test_the_account_in_words(tmp_path, weights):
    path = save(tmp_path, {"state_dict_ema": weights, "state_dict": weights, "epoch": 3})
    assert str(polyak.read(path)).splitlines() == [
        f"{path}: timm",
        "  average 'average': <2 tensors, 32 bytes>",
        "  raw weights: <2 tensors, 32 bytes>",
        "  epoch: 3",
    ]


def test_our_own_state_with_its_profiles(tmp_path):
    model = zoo.mlp()
    profiles = {"long": polyak.Power(relative_std=0.1), "short": polyak.Exponential(0.9)}
    average = polyak.WeightAverage(model, profiles)
    zoo.drift(model)
    average.update()
    content = {"model": model.state_dict(), "average": average.state_dict()}
    checkpoint = polyak.read(save(tmp_path, content))
    assert (checkpoint.format, dict(checkpoint.profiles)) == ("polyak-state", profiles)
    for name in profiles:
        assert zoo.bit_equal(dict(checkpoint.averages[name]), average[name].weights())
    assert zoo.bit_equal(dict(checkpoint.raw_weights), model.state_dict())
    assert checkpoint.counters == {"time": 1.0, "num_updates": 1}


def test_our_own_export(tmp_path):
    model = zoo.mlp()
    average = polyak.WeightAverage(model, polyak.Exponential(0.9))
    zoo.drift(model)
    average.update()
    average.export(tmp_path / "x.safetensors")
    checkpoint = polyak.read(tmp_path / "x.safetensors", model=model)
    assert (checkpoint.format, dict(checkpoint.profiles)) == ("polyak", {"average": polyak.Exponential(0.9)})
    assert zoo.bit_equal(dict(checkpoint.average), average.weights())


class TestTensorsThatAreNotPlain:
    def test_they_are_left_out_by_name(self, tmp_path, weights):
        odd = {"sparse": torch.eye(2).to_sparse(), "conjugate": torch.tensor([1 + 2j]).conj()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates quantised tensors
            odd["quantised"] = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
            path = save(tmp_path, {"state_dict_ema": {**weights, **odd}, "state_dict": weights})
        checkpoint = polyak.read(path)
        assert zoo.bit_equal(dict(checkpoint.average), weights)
        assert checkpoint.missing == tuple(odd)
        assert checkpoint.notes == ("left out, for they are no plain tensors: 'sparse', 'conjugate', 'quantised'",)

    def test_attributes_do_not_matter(self, tmp_path, weights):
        weights["layer.weight"].tensor_parallel = {"dimension": 1}
        parameter = torch.nn.Parameter(torch.ones(2))
        parameter.sequence_parallel = True
        content = {"state_dict_ema": {**weights, "p": parameter}}
        assert zoo.bit_equal(dict(polyak.read(save(tmp_path, content)).average), {**weights, "p": torch.ones(2)})
