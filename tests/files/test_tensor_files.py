"""Safetensors files and folders of them, against the package safetensors and transformers."""

import hashlib
import json
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

import polyak
import zoo
from polyak.files.containers import CHECKSUMS
from polyak.files.writing import safetensors as safetensors_file
from polyak.files.writing import write_safetensors, write_sharded


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def some(dtype):
    return torch.arange(256).to(torch.uint8).view(dtype).clone()


def parsed(content):
    """The header and the bytes of each tensor."""
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__")
    data = content[8 + length :]
    for entry in header.values():
        start, end = entry.pop("data_offsets")
        entry["data"] = data[start:end]
    return metadata, header


@pytest.mark.protects
@pytest.mark.parametrize("dtype", safetensors_file._DTYPES, ids=str)
def test_every_dtype_as_the_package_safetensors_writes_it(dtype, tmp_path):
    bits = some(torch.bool if dtype == torch.bool else dtype)
    tensors = {"a": bits, "odd": bits[:3].clone(), "scalar": bits[:1].reshape(()).clone(), "none": bits[:0].clone()}
    tensors |= {"matrix": bits[:6].reshape(2, 3).clone(), "byte": torch.tensor([7], dtype=torch.uint8)}
    write_safetensors(tmp_path / "x", tensors, metadata={"a": "ä"})
    metadata, ours = parsed((tmp_path / "x").read_bytes())
    assert metadata.pop(CHECKSUMS)
    assert (metadata, ours) == parsed(save(tensors, {"format": "pt", "a": "ä"}))
    assert zoo.bit_equal(load_file(tmp_path / "x"), tensors)


@pytest.mark.protects
def test_views_are_written_as_what_they_show(tmp_path):
    base = torch.arange(24).reshape(4, 6) * torch.tensor(1 + 2j)
    tensors = {
        "conjugate": base.conj(),
        "negative": torch._neg_view(base.real.contiguous()),
        "transposed": base.T,
        "column": base[:, 1],
    }
    tensors |= {"row": base[1], "expanded": base[:1, :1].expand(3, 3), "parameter": torch.nn.Parameter(base.real)}
    write_safetensors(tmp_path / "x", tensors, metadata={})
    found = load_file(tmp_path / "x")
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.uint8, torch.complex64])
def test_on_a_processor_with_the_highest_byte_first(dtype, tmp_path, monkeypatch):
    tensor = some(dtype)
    # What such a processor has in its memory for the same numbers.
    swapped = tensor.clone()
    swapped.untyped_storage().byteswap(dtype)
    before = swapped.clone()
    monkeypatch.setattr(sys, "byteorder", "big")
    write_safetensors(tmp_path / "x", {"a": swapped}, metadata={})
    monkeypatch.undo()
    assert zoo.bit_equal(load_file(tmp_path / "x"), {"a": tensor})
    assert zoo.bit_equal({"a": swapped}, {"a": before})


class TestChecksums:
    def test_they_are_those_of_the_bytes_in_the_file(self, tmp_path):
        average = polyak.WeightAverage(zoo.batchnorm())
        average.update()
        average.export(tmp_path / "x.safetensors", dtype=torch.bfloat16)
        metadata, tensors = parsed((tmp_path / "x.safetensors").read_bytes())
        sums = {name: hashlib.sha256(entry["data"]).hexdigest()[:16] for name, entry in tensors.items()}
        assert json.loads(metadata["polyak.checksums"]) == sums
        assert len(sums) == len(average.weights())
        assert metadata["num_updates"] == "1"

    @pytest.mark.protects
    def test_of_a_tensor_of_several_chunks_that_somebody_changes_meanwhile(self, tmp_path, monkeypatch):
        monkeypatch.setattr(safetensors_file, "_CHUNK", 1000)
        tensor = torch.zeros(2500, dtype=torch.uint8)
        digest, seen = hashlib.sha256, []

        class Changing:
            def __init__(self):
                self.digest = digest()

            def update(self, chunk):
                seen.append(len(chunk))
                self.digest.update(chunk)
                tensor[:1000] = 1

            def hexdigest(self):
                return self.digest.hexdigest()

        monkeypatch.setattr(hashlib, "sha256", Changing)
        write_safetensors(tmp_path / "x", {"a": torch.zeros(0), "b": tensor[:2500]}, metadata={})
        assert seen == [1000, 1000, 500]
        monkeypatch.undo()
        metadata, tensors = parsed((tmp_path / "x").read_bytes())
        assert metadata
        assert tensors["b"]["data"][1000:] == bytes(1500)

    def test_the_length_is_known_before(self, tmp_path):
        tensors = {'quote"': torch.zeros(3), "ä": torch.zeros(1), "new\nline": torch.zeros(2, 0)}
        write_safetensors(tmp_path / "x", tensors, metadata={"a": "b"})
        assert (tmp_path / "x").stat().st_size == safetensors_file.num_file_bytes(tensors, metadata={"a": "b"})
        assert load_file(tmp_path / "x").keys() == tensors.keys()


def test_what_the_format_has_not(tmp_path):
    wide = {"a": torch.zeros(1), "b": torch.zeros(1, dtype=torch.complex128)}
    with pytest.raises(ValueError, match=r"has no complex128, the dtype of 'b'; use state_dict\(\)"):
        write_safetensors(tmp_path / "x", wide, metadata={})
    with pytest.raises(ValueError, match=r"has no sparse tensors, such as 'b'; use to_dense\(\)"):
        write_safetensors(tmp_path / "x", {"b": torch.eye(2).to_sparse()}, metadata={})
    assert list(tmp_path.iterdir()) == []


class TestSharded:
    @staticmethod
    def tensors():
        tied = torch.full((30,), 5.0)
        return {
            "z": torch.arange(50.0),
            "a": torch.arange(100.0),
            "half": torch.ones(10, dtype=torch.bfloat16),
            "tied": tied,
            "tied too": tied,
        }

    def test_one_file_where_everything_fits(self, tmp_path):
        write_sharded(tmp_path / "out", self.tensors(), metadata={"a": "b"}, max_bytes=860)
        assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.safetensors"]
        assert zoo.bit_equal(load_file(tmp_path / "out" / "model.safetensors"), self.tensors())

    @pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
    def test_files_and_index(self, tmp_path, stem):
        tensors = self.tensors()
        write_sharded(tmp_path / "out", tensors, metadata={"a": "b"}, max_bytes=250, stem=stem)
        files = [f"{stem}-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
        index = json.loads((tmp_path / "out" / f"{stem}.safetensors.index.json").read_text())
        assert index == {
            "metadata": {"total_size": 860},
            # 200 bytes; 400, more than is allowed, alone; 20 + 120, and 120 more would be too much by 10.
            "weight_map": {"z": files[0], "a": files[1], "half": files[2], "tied": files[2], "tied too": files[3]},
        }
        there = {file.name for file in (tmp_path / "out").iterdir()}
        assert there == {*files, f"{stem}.safetensors.index.json"}
        found = {}
        for name in files:
            part = load_file(tmp_path / "out" / name)
            metadata = metadata_of(tmp_path / "out" / name)
            assert json.loads(metadata[CHECKSUMS]).keys() == part.keys()
            assert metadata["a"] == "b"
            assert all(index["weight_map"][tensor] == name for tensor in part)
            found |= part
        assert zoo.bit_equal(found, tensors)

    def test_other_files_of_the_folder(self, tmp_path):
        write_sharded(tmp_path / "x", self.tensors(), metadata={}, max_bytes=1000, beside={"config.json": b"{}"})
        assert (tmp_path / "x" / "config.json").read_bytes() == b"{}"

    def test_a_folder_that_is_not_empty(self, tmp_path):
        (tmp_path / "x").touch()
        with pytest.raises(FileExistsError, match="there is a folder with 1 entry; choose another name, or remove"):
            write_sharded(tmp_path, self.tensors(), metadata={}, max_bytes=100)

    @pytest.mark.parametrize("max_bytes", [0, -1])
    def test_a_limit_that_is_none(self, tmp_path, max_bytes):
        with pytest.raises(ValueError, match=f"max_bytes must be positive, not {max_bytes}"):
            write_sharded(tmp_path / "out", self.tensors(), metadata={}, max_bytes=max_bytes)

    @pytest.mark.protects
    def test_a_failure_in_the_second_file_leaves_nothing(self, tmp_path):
        tensors = self.tensors() | {"a": torch.empty(1000, device="meta")}
        with pytest.raises(NotImplementedError, match="meta tensor"):
            write_sharded(tmp_path / "out", tensors, metadata={}, max_bytes=250)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("max_bytes", [5_000, 1 << 30])
    def test_transformers_reads_it(self, tmp_path, max_bytes):
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        model = transformers.BertModel(transformers.BertConfig(vocab_size=40, **sizes)).eval()
        write_sharded(tmp_path / "out", model.state_dict(), metadata={}, max_bytes=max_bytes)
        model.config.save_pretrained(tmp_path / "out")
        found = transformers.BertModel.from_pretrained(tmp_path / "out")
        assert zoo.bit_equal(found.state_dict(), model.state_dict())


def test_ties_are_written_under_each_name(tmp_path):
    tied = torch.ones(3)
    write_safetensors(tmp_path / "x", {"a": tied, "b": tied}, metadata={})
    assert zoo.bit_equal(load_file(tmp_path / "x"), {"a": tied, "b": tied})
    with pytest.raises(RuntimeError, match="share memory"):
        save_file({"a": tied, "b": tied}, tmp_path / "x")
