"""`polyak.save` and `polyak.load`: what goes in comes out, or is refused before anything is written."""

import argparse
import collections
import enum
import math
import os
import random
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

import polyak
import zoo


class Mode(enum.IntEnum):
    FAST = 1


class Subclass(torch.Tensor):
    pass


def trained():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD(model.parameters(), lr=0.1), 10)
    average = polyak.WeightAverage(model, {"a": polyak.Uniform(), "b": polyak.Power(relative_std=0.1)})
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    average.update()
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "average": average}
    return {name: part.state_dict() for name, part in parts.items()}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "last.pt"
    polyak.save({"weight": torch.arange(1000.0), "step": 7}, path)
    return path


PLAIN = {
    "numbers": [0, -1, 2**70, -(2**2000), 1.5, math.inf, -0.0, True, False, None],
    "texts": ["", "ä\n\0\U0001f600", b"\x00\xff"],
    "containers": [(), (1, (2,)), [], [[]], {}, {"a": {}}, set(), {1, 2}, collections.OrderedDict(b=1, a=2)],
    "keys": {1: 1, None: 2, (1, "a"): 3, 1.5: 4, b"a": 5, torch.float32: 6},
    "of torch": [torch.Size([1, 2]), torch.bfloat16, torch.float8_e4m3fn, torch.device("cuda", 1)],
    "of a generator": random.Random(0).getstate(),
}


class TestSave:
    @pytest.mark.parametrize("name", PLAIN)
    @pytest.mark.parametrize("load", [polyak.load, lambda path: torch.load(path, weights_only=True)])
    def test_plain_values_come_out_with_their_types(self, name, load, tmp_path):
        polyak.save({"x": PLAIN[name]}, tmp_path / "x.pt")
        assert repr(load(tmp_path / "x.pt")) == repr({"x": PLAIN[name]})

    @pytest.mark.parametrize("name", zoo.MODELS)
    def test_models(self, name, tmp_path):
        state = zoo.MODELS[name]().state_dict()
        polyak.save(state, tmp_path / "x.pt")
        found = polyak.load(tmp_path / "x.pt")
        assert zoo.bit_equal(found, state)
        assert found._metadata == state._metadata
        assert [tensor.stride() for tensor in found.values()] == [tensor.stride() for tensor in state.values()]

    def test_what_a_training_saves(self, tmp_path):
        content = trained() | {"cpu generator": torch.get_rng_state(), "parameter": nn.Parameter(torch.ones(2))}
        polyak.save(content, tmp_path / "x.pt")
        found = polyak.load(tmp_path / "x.pt")
        assert repr(found) == repr(content)
        assert type(found["parameter"]) is nn.Parameter

    def test_kinds_of_tensors(self, tmp_path):
        strange = torch.ones(3)
        strange.note = {"a": [1]}
        content = {
            "sparse": torch.eye(2).to_sparse(),
            "conjugate": torch.tensor([1 + 2j]).conj(),
            "meta": torch.empty(2, device="meta"),
            "unsigned": torch.ones(2, dtype=torch.uint16),
            "note": strange,
        }
        polyak.save(content, tmp_path / "x.pt")
        found = polyak.load(tmp_path / "x.pt")
        assert repr(found) == repr(content)
        assert found["note"].note == {"a": [1]}

    def test_shared_memory_is_shared_again(self, tmp_path):
        tensor = torch.zeros(4)
        polyak.save({"whole": tensor, "part": tensor[:2], "again": tensor}, tmp_path / "x.pt")
        found = polyak.load(tmp_path / "x.pt")
        found["part"].fill_(1)
        assert found["whole"].tolist() == found["again"].tolist() == [1, 1, 0, 0]

    def test_what_contains_itself(self, tmp_path):
        content = {}
        content["itself"] = [content]
        polyak.save(content, tmp_path / "x.pt")
        found = polyak.load(tmp_path / "x.pt")
        assert found["itself"][0] is found

    @pytest.mark.protects
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"model": nn.Linear(1, 1)}, r"content['model'] is a Linear; save its state_dict()"),
            (
                {"a": [0, {"b": (1, Mode.FAST)}]},
                "content['a'][1]['b'][1] is a Mode; without running code only tensors, ",
            ),
            ({"a": numpy.float64(1)}, "content['a'] is a float64; save its tolist(), or a tensor of it"),
            ({"a": numpy.zeros(1)}, "content['a'] is a ndarray; save its tolist()"),
            ({"a": {1, frozenset()}}, "an element of content['a'] is a frozenset; without running code"),
            ({"a": {frozenset(): 1}}, "the key frozenset() of content['a'] is a frozenset; without running code"),
            ({"a": Path("x")}, "content['a'] is a PosixPath; without"),
            ({"a": argparse.Namespace()}, "content['a'] is a Namespace; without"),
            ({"a": collections.defaultdict(int)}, "content['a'] is a defaultdict; without"),
            ({"a": lambda: 0}, "content['a'] is a function; without"),
            ({"a": torch.ones(1).as_subclass(Subclass)}, "content['a'] is a Subclass; save a plain torch.Tensor of it"),
            (
                {"a": [b""]},
                "content['a'][0] is empty bytes, which torch.load(weights_only=True) cannot read; save None",
            ),
            ([1], "content is a list; save a dictionary, such as {'content': ...}"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_what_could_not_be_read_is_refused_before_anything_is_written(self, content, message, saved):
        before = saved.read_bytes(), saved.stat().st_ino
        with pytest.raises(TypeError) as caught:
            polyak.save(content, saved)
        assert str(caught.value).startswith(message)
        assert (saved.read_bytes(), saved.stat().st_ino) == before

    @pytest.mark.protects
    def test_attributes_are_looked_at_too(self, tmp_path):
        tensor = torch.ones(1)
        tensor.note = [Mode.FAST]
        with pytest.raises(TypeError, match=r"^content\['a'\].note\[0\] is a Mode"):
            polyak.save({"a": tensor}, tmp_path / "x.pt")
        state = nn.Linear(1, 1).state_dict()
        state._metadata["x"] = Mode.FAST
        with pytest.raises(TypeError, match=r"^content\._metadata\['x'\] is a Mode"):
            polyak.save(state, tmp_path / "x.pt")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.protects
    def test_a_failure_of_torch_leaves_the_old_file(self, saved):
        before = saved.read_bytes()
        tensor = torch.ones(2)
        with pytest.raises(RuntimeError, match="view the same data as different types"):
            polyak.save({"a": tensor, "b": tensor.view(torch.int32)}, saved)
        assert saved.read_bytes() == before
        assert os.listdir(saved.parent) == [saved.name]

    @pytest.mark.protects
    def test_checksums_also_where_they_are_switched_off(self, saved):
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            polyak.save({"a": torch.ones(3)}, saved)
            assert torch.serialization.get_crc32_options() is False
        finally:
            torch.serialization.set_crc32_options(before)
        assert polyak.load(saved)["a"].tolist() == [1, 1, 1]


def flip(path, position, bit=0):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


class TestLoad:
    @pytest.mark.protects
    def test_a_flipped_bit_in_a_tensor_that_torch_load_does_not_see(self, saved):
        position = saved.read_bytes().index(torch.arange(1000.0).numpy().tobytes())
        flip(saved, position + 4 * 500 + 3, bit=6)
        wrong = torch.load(saved, weights_only=True)["weight"]
        assert (wrong != torch.arange(1000.0)).nonzero().tolist() == [[500]]
        with pytest.raises(polyak.FileFormatError) as caught:
            polyak.load(saved)
        with zipfile.ZipFile(saved) as archive:
            (record,) = (name for name in archive.namelist() if name.endswith("data/0"))
        assert str(caught.value) == (
            f"{str(saved)!r} is damaged: the record {record!r}: its bytes do not fit its CRC32; take another copy of it"
        )

    @pytest.mark.protects
    def test_any_flipped_bit_is_seen_or_without_effect(self, saved):
        content = {"model": nn.Linear(3, 2).state_dict(), "step": 7}
        polyak.save(content, saved)
        good = saved.read_bytes()
        chance = random.Random(0)
        refused = 0
        for position in chance.sample(range(len(good)), 400):
            flip(saved, position, bit=chance.randrange(8))
            try:
                found = polyak.load(saved)
            except polyak.FileFormatError:
                refused += 1
            else:
                assert repr(found) == repr(content), position
            saved.write_bytes(good)
        assert 100 < refused < 400

    @pytest.mark.protects
    def test_a_flipped_bit_that_makes_a_record_a_folder(self, saved):
        content = saved.read_bytes()
        flip(saved, content.rindex(b"PK\x01\x02", 0, content.rindex(b"/data/0")) + 38, bit=4)
        with pytest.raises(polyak.FileFormatError, match=r"data/0': is marked as a folder, of which torch.load reads"):
            polyak.load(saved)

    @pytest.mark.protects
    @pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
    def test_a_file_that_is_cut_off(self, saved, kept):
        content = saved.read_bytes()
        saved.write_bytes(content[: int(kept * len(content))])
        with pytest.raises(polyak.FileFormatError, match=r"last.pt' is damaged: it is cut off, its list of records"):
            polyak.load(saved)

    def test_files_of_another_kind(self, saved):
        saved.write_text("text")
        with pytest.raises(polyak.FileFormatError, match=r"or torch\.save did not write it"):
            polyak.load(saved)

    @pytest.mark.protects
    def test_files_without_checksums(self, saved):
        content = torch.load(saved)
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(content, saved)
        finally:
            torch.serialization.set_crc32_options(True)
        told = r"last.pt' was written without checksums, and may be damaged; torch.load\(\) reads it unchecked"
        with pytest.raises(polyak.FileFormatError, match=told):
            polyak.load(saved)
        torch.save(content, saved, _use_new_zipfile_serialization=False)
        with pytest.raises(polyak.FileFormatError, match=told):
            polyak.load(saved)

    def test_files_of_safetensors(self, tmp_path):
        average = polyak.WeightAverage(nn.Linear(2, 2))
        average.update()
        average.export(tmp_path / "x.safetensors")
        with pytest.raises(polyak.FileFormatError, match=r"was not written by torch.save; polyak.read\(\) reads the"):
            polyak.load(tmp_path / "x.safetensors")

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            polyak.load(tmp_path / "x.pt")
        with pytest.raises(IsADirectoryError):
            polyak.load(tmp_path)

    def test_files_of_torch_save(self, tmp_path):
        torch.save({"a": torch.ones(2)}, tmp_path / "x.pt")
        assert polyak.load(tmp_path / "x.pt")["a"].tolist() == [1, 1]


class TestWhatIsSavedIsLoaded:
    @pytest.mark.parametrize(
        "value",
        [torch.zeros(1).expand(200_000), {((1, 2), 3): 1}, torch.uint4, 2**2000, [[[[[]]]]]],
        ids=["expanded", "keys", "dtype", "integer", "nested"],
    )
    def test_odd_ones(self, value, tmp_path):
        polyak.save({"x": value}, tmp_path / "x.pt")
        assert repr(polyak.load(tmp_path / "x.pt")["x"]) == repr(value)

    def test_a_name_for_files_of_another_kind(self, tmp_path):
        with pytest.raises(ValueError, match=r"x.safetensors': this is a file of torch.save; name it .pt"):
            polyak.save({"x": 1}, tmp_path / "x.safetensors")

    def test_what_torch_could_not_read_is_refused(self, tmp_path):
        with pytest.raises(TypeError, match=r"content\['x'\] is an integer of 9966 bits, which torch.load"):
            polyak.save({"x": 10**3000}, tmp_path / "x.pt")
        deep = []
        for _ in range(5000):
            deep = [deep]
        with pytest.raises(ValueError, match="content has containers in containers, deeper than Python can save them"):
            polyak.save({"x": deep}, tmp_path / "x.pt")
        assert list(tmp_path.iterdir()) == []
