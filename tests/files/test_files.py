"""Exported files."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import polyak
import zoo

pytestmark = pytest.mark.filterwarnings("ignore:the average is .* after 0 updates")


@pytest.mark.protects
@pytest.mark.parametrize("name", zoo.MODELS)
def test_export_loads_strictly_into_the_bare_model(name, tmp_path):
    model = zoo.MODELS[name]()
    average = polyak.WeightAverage(model, polyak.Uniform())
    zoo.drift(model)
    average.update()
    average.export(tmp_path / "ema.safetensors")
    loaded = load_file(tmp_path / "ema.safetensors")
    assert zoo.bit_equal(loaded, average.weights())
    zoo.MODELS[name]().load_state_dict(loaded, strict=True)


def test_export_in_another_dtype(tmp_path):
    average = polyak.WeightAverage(zoo.batchnorm())
    average.export(str(tmp_path / "ema.safetensors"), dtype=torch.bfloat16)
    loaded = load_file(tmp_path / "ema.safetensors")
    assert loaded["1.num_batches_tracked"].dtype == torch.int64
    assert zoo.bit_equal({"0.weight": loaded["0.weight"]}, {"0.weight": average.weights()["0.weight"].bfloat16()})
    with pytest.raises(ValueError, match=r"floating-point tensors cannot be cast to torch.int8"):
        average.export(tmp_path / "other.safetensors", dtype=torch.int8)


@pytest.mark.protects
def test_a_number_that_becomes_infinite_is_refused(tmp_path):
    model = zoo.mlp()
    with torch.no_grad():
        model[0].weight[1, 2] = 1e6
    average = polyak.WeightAverage(model)
    with pytest.raises(ValueError, match=r"^'0.weight' has the number 1e\+06, and torch.float16 ends at 65504; choose"):
        average.export(tmp_path / "ema.safetensors", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"torch\.float8_e5m2 ends at 57344; choose another dtype"):
        average.export(tmp_path / "ema.safetensors", dtype=torch.float8_e5m2)
    average.export(tmp_path / "ema.safetensors", dtype=torch.bfloat16)
    polyak.WeightAverage(zoo.mlp()).export(tmp_path / "ema.safetensors", dtype=torch.float8_e4m3fn)


def test_export_says_what_it_holds(tmp_path):
    average = polyak.WeightAverage(zoo.mlp(), {"mean": polyak.Uniform(), "ema": polyak.Exponential(0.9)})
    average.update(at=32)
    average["ema"].export(tmp_path / "ema.safetensors")
    with safe_open(tmp_path / "ema.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert polyak.profile_from_description(json.loads(metadata["profile"])) == polyak.Exponential(0.9)
    assert (float(metadata["time"]), int(metadata["num_updates"])) == (32.0, 1)


@pytest.mark.parametrize("name", ["x.pt", "x.pth", "x.ckpt"])
def test_a_name_that_promises_another_kind_of_file_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=rf"{name}': an export is a safetensors file, and \.\w+ says"):
        polyak.WeightAverage(zoo.mlp()).export(tmp_path / name)


def test_a_folder_is_no_file_to_export_to(tmp_path):
    with pytest.raises(IsADirectoryError, match="it is a folder, and the name of a file is needed"):
        polyak.WeightAverage(zoo.mlp()).export(tmp_path)
