"""What is saved: contents with a version number in every tensor; and the reading that says which version stands."""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

import polyak
from polyak.files.writing import write_sharded


class State:
    """A dictionary, by `polyak.save`."""

    name = "state.pt"

    def __init__(self, num_elements):
        self.num_elements = num_elements

    def write(self, path, version):
        tensors = versioned(self.num_elements, version)
        polyak.save({"version": version, "tensors": tensors, "names": list(tensors)}, path)

    @staticmethod
    def read(path):
        content = polyak.load(path)
        assert list(content["tensors"]) == content["names"]
        return only({content["version"], *values(content["tensors"])})


class Export:
    """An average, by `export`."""

    name = "export.safetensors"

    def __init__(self, num_elements):
        self.model = nn.Linear(num_elements // 4, 4)
        self.average = polyak.WeightAverage(self.model, polyak.Uniform())

    def write(self, path, version):
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(version)
        self.average.reset()
        self.average.update()
        self.average.export(path)

    @staticmethod
    def read(path):
        tensors = checked(path)
        assert tensors.keys() == {"weight", "bias"}
        return only(values(tensors))


class Sharded:
    """A folder of several files. One that is there is moved away first, for it is not replaced."""

    name = "sharded"

    def __init__(self, num_elements):
        self.num_elements = num_elements

    def write(self, path, version):
        path = Path(path)
        if path.exists():
            away = path.rename(path.with_name("away"))
            shutil.rmtree(away)
        write_sharded(
            path, versioned(self.num_elements, version), metadata={"version": str(version)}, max_bytes=self.num_elements
        )

    @staticmethod
    def read(path):
        path = Path(path)
        index = json.loads((path / "model.safetensors.index.json").read_text())
        files = set(index["weight_map"].values())
        assert {file.name for file in path.iterdir()} == {*files, "model.safetensors.index.json"}
        tensors = {name: tensor for file in files for name, tensor in checked(path / file).items()}
        assert tensors.keys() == index["weight_map"].keys()
        return only(values(tensors))


KINDS = (State, Export, Sharded)


def versioned(num_elements, version):
    large = {f"layer.{number}": torch.full((num_elements // 4,), float(version)) for number in range(4)}
    return {**large, "step": torch.tensor(version)}


def checked(path):
    """The tensors of a safetensors file, after a comparison with its checksums that has nothing from polyak."""
    with safe_open(path, "pt") as file:
        sums = json.loads(file.metadata()["polyak.checksums"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dictionary
    assert sums.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
        assert found == sums[name], name
    return tensors


def values(tensors):
    return {int(value) for tensor in tensors.values() for value in (tensor.min(), tensor.max())}


def only(versions):
    (version,) = versions
    return version
