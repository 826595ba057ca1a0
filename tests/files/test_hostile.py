"""Files that want to run code, take memory or time, or lie: each is one FileFormatError, and nothing happens."""

import io
import json
import pickle
import re
import resource
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hostile
import polyak
import zoo
from polyak.files.containers.pickled import unpickle

ATTACKS = sorted(hostile.attacks("canary"))
REFUSED = polyak.FileFormatError


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code of the file has run"


def refused(path, match=None, **options):
    start = time.perf_counter()
    with pytest.raises(REFUSED, match=match) as caught:
        polyak.read(path, **options)
    assert time.perf_counter() - start < 5
    assert str(path.name) in str(caught.value)
    return str(caught.value)


class TestPickles:
    @pytest.mark.protects
    @pytest.mark.parametrize("name", ATTACKS)
    def test_nothing_of_it_runs(self, name, tmp_path, canary):
        attack = hostile.attacks(canary)[name]
        pickled = hostile.dictionary(state_dict_ema=hostile.dictionary(w=hostile.tensor())[2:-1], x=attack)
        refused(hostile.archive(tmp_path / "zip.pth", pickled))
        (tmp_path / "legacy.pth").write_bytes(hostile.legacy(pickled, [("0", bytes(64))]))
        refused(tmp_path / "legacy.pth")
        (tmp_path / "pickle.pkl").write_bytes(pickled)
        refused(tmp_path / "pickle.pkl")
        folder = tmp_path / "folder"
        folder.mkdir()
        hostile.archive(folder / "pytorch_model.bin", pickled)
        refused(folder)
        distributed = tmp_path / "distributed"
        distributed.mkdir()
        (distributed / ".metadata").write_bytes(pickled)
        refused(distributed)
        with pytest.raises(REFUSED):
            polyak.ModelEma(zoo.mlp(), resume=tmp_path / "zip.pth")

    @pytest.mark.parametrize("name", ATTACKS)
    def test_nor_where_objects_are_passed_over(self, name, tmp_path, canary):
        attack = hostile.attacks(canary)[name]
        pickled = hostile.dictionary(state_dict_ema=hostile.dictionary(w=hostile.tensor())[2:-1], x=attack)
        path = hostile.archive(tmp_path / "zip.pth", pickled)
        try:
            checkpoint = polyak.read(path, skip_objects=True)
        except REFUSED:
            return
        assert checkpoint.average["w"].shape == (2, 3)

    @pytest.mark.parametrize("protocol", range(6))
    def test_whatever_the_protocol(self, protocol, tmp_path, canary):
        import os

        pickled = pickle.dumps({"x": hostile.Reduced(os.system, f"touch {canary}")}, protocol=protocol)
        refused(
            hostile.archive(tmp_path / "x.pth", pickled), match=r"holds the object (posix|nt).system, whose loading"
        )

    def test_in_a_piece_of_a_distributed_checkpoint(self, tmp_path, canary):
        import torch.distributed.checkpoint as dcp

        with pytest.warns(UserWarning, match="single process"):
            dcp.save({"model": {"w": torch.ones(3)}}, checkpoint_id=tmp_path / "dcp")
        pieces = tmp_path / "dcp" / "__0_0.distcp"
        attack = hostile.attacks(canary)["os.system"]
        hostile.archive(tmp_path / "attack", b"\x80\x02" + attack + b".")
        data = (tmp_path / "attack").read_bytes()
        pieces.write_bytes(data + bytes(max(0, pieces.stat().st_size - len(data))))
        refused(tmp_path / "dcp")

    def test_a_pickled_module(self, tmp_path):
        model = nn.Linear(2, 3)
        torch.save({"ema": model, "updates": 3}, tmp_path / "last.pt")
        told = refused(tmp_path / "last.pt")
        assert "holds the object torch.nn.modules.linear.Linear, whose loading could run code" in told
        assert "run_pickled_code=True runs the code, if you trust whoever wrote the file" in told
        checkpoint = polyak.read(tmp_path / "last.pt", run_pickled_code=True)
        assert checkpoint.format == "dit"
        assert zoo.bit_equal(dict(checkpoint.average), model.state_dict())

    def test_objects_beside_the_tensors_may_be_passed_over(self, tmp_path):
        content = {
            "state_dict_ema": {"w": torch.ones(2)},
            "settings": hostile.Reduced(dict, [("a", 1)]),
            "x": nn.ReLU(),
        }
        torch.save(content, tmp_path / "x.pth")
        refused(tmp_path / "x.pth", match="skip_objects=True reads the tensors and plain values around it")
        checkpoint = polyak.read(tmp_path / "x.pth", skip_objects=True)
        assert zoo.bit_equal(dict(checkpoint.average), {"w": torch.ones(2)})

    def test_code_that_is_damaged(self, tmp_path):
        torch.save({"ema": nn.Linear(2, 3)}, tmp_path / "x.pth")
        data = (tmp_path / "x.pth").read_bytes()
        for content in (b"", b"hello", data[: len(data) // 2]):
            (tmp_path / "x.pth").write_bytes(content)
            refused(tmp_path / "x.pth", match="is damaged, and cannot be read", run_pickled_code=True)


class TestMemoryAndTime:
    @pytest.mark.parametrize(
        "operations",
        [
            b"r\xff\xff\xff\xff",
            b"r\xff\xff\xff\x7f",
            b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f",
            b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
            b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f",
            b"\x8b\xff\xff\xff\x7f",
            b"\x95\xff\xff\xff\xff\xff\xff\xff\xff",
            b"J\xff\xff\xff\x7f\x85cbuiltins\nbytearray\nR",
            b"L" + b"9" * 5000 + b"L\n",
        ],
        ids=["memo", "half of it", "bytearray", "bytes", "text", "integer", "frame", "call", "digits"],
    )
    def test_numbers_that_ask_for_memory(self, operations, tmp_path):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        path = hostile.archive(tmp_path / "x.pth", b"\x80\x04}" + operations + b".")
        refused(path)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # in kB

    def test_tuples_whose_hash_takes_for_ever(self, tmp_path):
        tower = b")" + b"2\x86" * 64
        refused(hostile.archive(tmp_path / "x.pth", b"\x80\x02}" + tower + b"Ns."), match="of no known format")

    @pytest.mark.parametrize("opening", [b"]", b"}" + hostile.text("a"), b"("], ids=["lists", "dictionaries", "marks"])
    def test_depth(self, opening, tmp_path):
        closing = {b"]": b"a", b"(": b"t"}.get(opening, b"s")
        body = opening * 100_000 + b"N" + closing * 100_000
        refused(hostile.archive(tmp_path / "x.pth", b"\x80\x02}" + hostile.text("x") + body + b"s."))

    def test_what_contains_itself(self, tmp_path):
        body = b"\x80\x02}q\x00" + hostile.text("ema") + b"h\x00s" + hostile.text("l") + b"]q\x01h\x01as."
        refused(hostile.archive(tmp_path / "x.pth", body), match="of no known format")

    def test_what_doubles_at_each_step(self, tmp_path):
        body = b"]" + b"(22l" * 40
        path = hostile.archive(tmp_path / "x.pth", hostile.dictionary(state_dict_ema=body, ema=body))
        refused(path)

    @pytest.mark.parametrize("beginning", [b"X\xff\xff\xff\x7f", b"\x8e" + struct.pack("<Q", 15 << 30), b"S'"])
    def test_holes_of_an_old_file(self, beginning, tmp_path):
        with (tmp_path / "x.pth").open("wb") as file:
            file.write(hostile.legacy(b"\x80\x04" + beginning)[: -len(pickle.dumps([], protocol=2))])
            file.truncate(20 << 30)
        code = "import resource; resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30)); import sys, polyak\n"
        code += "try: polyak.read(sys.argv[1])\n"
        code += "except polyak.FileFormatError: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        done = subprocess.run([sys.executable, "-c", code, tmp_path / "x.pth"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < 2_000_000  # in kB

    def test_more_than_tensors_need(self):
        pickled = b"\x80\x02(" + b"]" * 1000 + b"l."
        assert len(unpickle(io.BytesIO(pickled), find=None, persistent=None)) == 1000
        with pytest.raises(REFUSED, match="a pickle in it has over 1,000 operations, which no file of tensors needs"):
            unpickle(io.BytesIO(pickled), find=None, persistent=None, max_operations=1000)

    @pytest.mark.parametrize("model", [None, nn.Linear(2, 2)])
    def test_names_of_parts_within_parts(self, model, tmp_path):
        deep = ".".join("a" * 50_000)
        content = {
            "state_dict_ema": {"x" if model is None else deep: torch.ones(2)},
            "state_dict": {deep: torch.ones(2)},
        }
        torch.save(content, tmp_path / "x.pth")
        tracemalloc.start()
        try:
            if model is None:
                assert list(polyak.read(tmp_path / "x.pth").average) == ["x"]
            else:
                with pytest.raises(polyak.MismatchError):
                    polyak.read(tmp_path / "x.pth", model=model)
            assert tracemalloc.get_traced_memory()[1] < 50_000_000
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize(
        ("numbers", "match"),
        [
            ({"shape": (10**9, 10**9), "stride": (0, 0)}, "repeats 64 bytes to fill 4,000,000,000,000,000,000"),
            ({"shape": (10**8,), "stride": (0,)}, "repeats 64 bytes to fill 400,000,000"),
            ({"shape": (17,), "stride": (1,)}, "reaches byte 68 of a storage of 64"),
            ({"shape": (2, 3), "stride": (14, 1)}, "reaches byte 68 of a storage of 64"),
            ({"start": 15}, "reaches byte 84 of a storage of 64"),
            ({"start": -1}, "impossible form"),
            ({"shape": (-2, 3)}, "impossible form"),
            ({"stride": (-3, 1)}, "impossible form"),
            ({"shape": (2,), "stride": (1, 1)}, "impossible form"),
            ({"shape": (1,) * 65, "stride": (1,) * 65}, "impossible form"),
            ({"shape": (2**70,), "stride": (1,)}, "impossible form"),
            ({"shape": (0, 2**62 + 1), "stride": (1, 1)}, "impossible form"),
            ({"shape": (1.5,), "stride": (1,)}, "impossible form"),
            ({"kind": "NoStorage"}, "holds the object torch.NoStorage"),
            ({"key": "9"}, "has no storage '9'"),
            ({"key": "../../etc/passwd"}, "has no storage"),
        ],
    )
    @pytest.mark.protects
    def test_tensors_that_lie_outside_of_their_storage(self, numbers, match, tmp_path):
        inner = hostile.dictionary(w=hostile.tensor(**numbers))[2:-1]
        refused(hostile.archive(tmp_path / "x.pth", hostile.dictionary(state_dict_ema=inner)), match=match)


class TestArchives:
    def test_compressed_ones(self, tmp_path):
        pickled = hostile.dictionary(state_dict_ema=hostile.dictionary(w=hostile.tensor())[2:-1])
        path = hostile.archive(
            tmp_path / "bomb.pth", pickled, storages={"0": bytes(10**7)}, compression=zipfile.ZIP_DEFLATED
        )
        refused(path, match="compressed record 'archive/data.pkl', which torch.save never writes")

    def test_two_records_of_one_name(self, tmp_path):
        pickled = hostile.dictionary(a=b"N")
        with pytest.warns(UserWarning, match="Duplicate name"):
            path = hostile.archive(tmp_path / "x.pth", pickled, extra=[("archive/data/0", b"other")])
        refused(path, match="has two records 'archive/data/0'")

    def test_records_that_overlap(self, tmp_path):
        path = hostile.archive(
            tmp_path / "x.pth", hostile.dictionary(a=b"N"), storages={"0": bytes(64), "1": bytes(64)}
        )
        data = bytearray(path.read_bytes())
        places = [found.start() for found in re.finditer(rb"PK\x01\x02", data)]
        names = [bytes(data[place + 46 : place + 46 + 14]) for place in places]
        zero, one = names.index(b"archive/data/0"), names.index(b"archive/data/1")
        data[places[one] + 42 : places[one] + 46] = data[places[zero] + 42 : places[zero] + 46]
        path.write_bytes(data)
        refused(path, match="overlap")

    def test_records_within_records(self, tmp_path):
        # Each holds all that come after it, so that their bytes together are many times the file.
        size, heads, entries = 1_000_000, [], []
        for place in range(500):
            name = b"archive/data/%d" % place
            about = (20, 0, 0, 0, 0, 1, size, size, len(name))
            heads.append(struct.pack("<4s5H3I2H", b"PK\x03\x04", *about, 0) + name)
            entries.append((about, name))
            size += len(heads[-1])
        body, directory, place = b"".join(reversed(heads)) + bytes(1_000_000), b"", 0
        for (about, name), head in zip(reversed(entries), reversed(heads), strict=True):
            entry = struct.pack("<4sH5H3IH", b"PK\x01\x02", 20, *about)
            directory += entry + bytes(12) + struct.pack("<I", place) + name
            place += len(head)
        end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 500, 500, len(directory), len(body), 0)
        (tmp_path / "x.pth").write_bytes(body + directory + end)
        refused(tmp_path / "x.pth", match="has records that overlap")
        with pytest.raises(REFUSED, match=r"its records overlap, which torch.save never writes"):
            polyak.load(tmp_path / "x.pth")

    def test_a_flipped_bit_in_the_pickle(self, tmp_path):
        path = hostile.archive(
            tmp_path / "x.pth", hostile.dictionary(state_dict_ema=b"}", note=hostile.text("aaaaaaaa"))
        )
        path.write_bytes(path.read_bytes().replace(b"aaaaaaaa", b"aaaabaaa"))
        refused(path, match="its data.pkl is not what was written, by its checksum")

    @pytest.mark.parametrize(
        "content",
        [{"w": hostile.tensor(numel=1 << 62)}, {"w": b"}]Ns"}, {"w": b"}}Ns"}],
        ids=["a storage of absurd size", "a list as a key", "a dictionary as a key"],
    )
    def test_loading_of_what_is_not_as_torch_saves_it(self, content, tmp_path):
        hostile.archive(tmp_path / "x.pth", hostile.dictionary(**content))
        with pytest.raises(REFUSED, match=r"x.pth' is damaged, and cannot be read: "):
            polyak.load(tmp_path / "x.pth")

    def test_programs(self, tmp_path):
        path = hostile.archive(
            tmp_path / "x.pt", hostile.dictionary(a=b"N"), extra=[("archive/constants.pkl", b"\x80\x02).")]
        )
        refused(path, match="is a TorchScript program, which is code; save the state_dict")

    def test_of_another_machine(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "x.pth", "w") as file:
            file.writestr("archive/data.pkl", hostile.dictionary(a=b"N"))
            file.writestr("archive/byteorder", "big")
        refused(tmp_path / "x.pth", match="was written on a big-endian machine")

    @pytest.mark.parametrize("legacy", [False, True])
    @pytest.mark.protects
    def test_cut_off_anywhere(self, legacy, tmp_path):
        path = tmp_path / "x.pth"
        torch.save({"state_dict_ema": {"w": torch.ones(9)}}, path, _use_new_zipfile_serialization=not legacy)
        data = path.read_bytes()
        for length in range(0, len(data), 7):
            path.write_bytes(data[:length])
            refused(path)

    @pytest.mark.parametrize(
        "content", [b"", b"\x00" * 64, b"PK\x03\x04", b"{}", b"PK\x03\x04" + bytes(100), b"\x80\x02."]
    )
    def test_what_is_none(self, content, tmp_path):
        (tmp_path / "x.pth").write_bytes(content)
        refused(tmp_path / "x.pth")

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            polyak.read(tmp_path / "nothing.pth")
        (tmp_path / "folder").mkdir()
        refused(tmp_path / "folder", match=r"is a folder without weights: .* In it: nothing")

    def test_not_a_dictionary(self, tmp_path):
        torch.save([torch.ones(1)], tmp_path / "x.pth")
        refused(tmp_path / "x.pth", match="holds a list, not a dictionary")


class TestSafetensors:
    def write(self, path, header, data=b"", length=None):
        encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + data)
        return path

    @pytest.mark.parametrize(
        "entry",
        [
            {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [2], "data_offsets": [0, 800]},
            {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
            {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
            {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]},
            {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]},
            {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]},
            {"dtype": "F32"},
            None,
        ],
    )
    def test_entries_that_lie(self, entry, tmp_path):
        refused(self.write(tmp_path / "x.safetensors", {"w": entry}, bytes(8)))

    @pytest.mark.parametrize("length", [0, 1, 10**8, 10**12, 2**63, 2**64 - 1])
    def test_headers_of_absurd_length(self, length, tmp_path):
        header = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
        refused(self.write(tmp_path / "x.safetensors", header, bytes(8), length=length))

    def test_headers_that_are_none(self, tmp_path):
        refused(self.write(tmp_path / "x.safetensors", b"{" * 1000, bytes(8)))
        refused(self.write(tmp_path / "x.safetensors", b'{"a":' + b"[" * 100_000, bytes(8)))


class TestFolders:
    @pytest.mark.parametrize(
        "name", ["../x.safetensors", "/etc/passwd", "..", "a/b.safetensors", "nothing.safetensors"]
    )
    def test_an_index_that_leads_out(self, name, tmp_path):
        (tmp_path / "x.safetensors").write_bytes(b"")
        folder = tmp_path / "folder"
        folder.mkdir()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
        refused(folder, match=r"leads out of its folder|lacks 'nothing.safetensors'")

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000])
    def test_an_index_that_is_none(self, content, tmp_path):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        refused(tmp_path)

    def test_holes_of_an_index(self, tmp_path):
        with (tmp_path / ".metadata").open("wb") as file:
            file.truncate(20 << 30)
        refused(tmp_path, match="has an index of 21,474,836,480 bytes, which no checkpoint needs")

    def test_a_configuration_of_absurd_size(self, tmp_path):
        save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_bytes(b'{"a":[' + b"[]," * 12_000_000 + b"0]}")
        refused(tmp_path, match="has 'config.json', which has 36,000,009 bytes, which no model needs")

    def test_a_distributed_checkpoint_without_a_file(self, tmp_path):
        import torch.distributed.checkpoint as dcp

        with pytest.warns(UserWarning, match="single process"):
            dcp.save({"model": {"w": torch.ones(3)}}, checkpoint_id=tmp_path / "dcp")
        (tmp_path / "dcp" / "__0_0.distcp").unlink()
        refused(tmp_path / "dcp", match="names the file '__0_0.distcp' for 'model.w', which is not in it")


def test_a_file_that_becomes_shorter(tmp_path):
    torch.save({"state_dict_ema": {"w": torch.ones(10_000)}}, tmp_path / "x.pth")
    checkpoint = polyak.read(tmp_path / "x.pth")
    (tmp_path / "x.pth").write_bytes(b"PK")
    with pytest.raises(polyak.FileFormatError, match="has become shorter since it was opened"):
        _ = checkpoint.average["w"]


def test_a_minute_of_fuzzing_in_short():
    from pathlib import Path

    script = Path(__file__).parents[1] / "support" / "fuzz.py"
    found = subprocess.run(
        [sys.executable, script, "--files", "600", "--processes", "1"], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "600 files" in found.stdout


def test_trees_come_back_as_they_were_saved(tmp_path):
    from hypothesis import given, settings
    from hypothesis import strategies as st

    leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(max_size=9)
    tensors = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]).map(
        lambda d: torch.ones(2, 3).to(d)
    )
    trees = st.recursive(
        leaves | tensors,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
            | st.tuples(inner, inner)
        ),
        max_leaves=9,
    )

    @settings(max_examples=60, deadline=None)
    @given(content=st.dictionaries(st.text(), trees, max_size=4), legacy=st.booleans())
    def check(content, legacy):
        from polyak.files.checkpoints import read_dictionary

        path = tmp_path / "tree.pt"
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        assert same(read_dictionary(path), content)

    check()


def same(one, two):
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(two) and len(one) == len(two) and all(map(same, one, two))
    return type(one) is type(two) and one == two


def test_pieces_that_overlap(tmp_path):
    """A distributed checkpoint whose index tells one piece twice, and another one never."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"w": torch.ones(2, 2)}, checkpoint_id=tmp_path / "dcp")
    index = pickle.loads((tmp_path / "dcp" / ".metadata").read_bytes())
    entry = index.state_dict_metadata["w"]
    entry.size = torch.Size([4, 2])
    entry.chunks = [ChunkStorageMetadata(torch.Size([at, 0]), torch.Size([2, 2])) for at in (0, 1)]
    place = next(iter(index.storage_data.values()))
    index.storage_data = {MetadataIndex("w", torch.Size([at, 0])): place for at in (0, 1)}
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(index))
    refused(tmp_path / "dcp", match="pieces of 'w' overlap")
    entry.chunks = entry.chunks[:1]
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(index))
    refused(tmp_path / "dcp", match="the pieces of 'w' have 4 numbers of 8")


def test_what_is_no_file(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", match="is neither a file nor a folder")


def test_keys_that_look_like_patterns(tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2)).state_dict()
    torch.save({"*" * 60: averaged, "*" * 59 + "#": averaged}, tmp_path / "x.pth")
    start = time.perf_counter()
    assert len(polyak.read(tmp_path / "x.pth").averages) == 2
    assert time.perf_counter() - start < 5


def test_a_profile_whose_text_has_no_end(tmp_path):
    tower = []
    for _ in range(100):
        tower = [tower, tower]
    content = {
        "averages": {"x": {"a": {"w": torch.ones(2)}}},
        "clock": {"time": 1.0, "num_updates": 1},
        "configuration": {"profiles": {"a": {"profile": "power", "exponent": tower}}},
    }
    torch.save(content, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", match="has a profile that is none")


@pytest.mark.parametrize("operation", [b"cbuiltins\nlist\n", b"cbuiltins\ntuple\n", b"ccollections\nOrderedDict\n"])
def test_what_is_copied_again_and_again(operation, tmp_path):
    pairs = operation == b"ccollections\nOrderedDict\n"
    one = b"(K\x01Kt" if pairs else b"K\x01"
    one = b"]K\x01aK\x02a" if pairs else one
    body = b"\x80\x02}" + hostile.text("x") + b"](" + one * 100_000 + b"eq\x000]"
    body += (operation + b"(h\x00tRa") * 2_000
    refused(hostile.archive(tmp_path / "x.pth", body + b"s."), match="copies the same again and again|damaged")


def test_many_dictionaries_at_the_top(tmp_path):
    content = {f"layer{place}.weight": {"exp_avg": torch.zeros(1)} for place in range(4000)}
    torch.save({"ema_model": {"w": torch.ones(1)}, **content}, tmp_path / "x.pth")
    start = time.perf_counter()
    assert polyak.read(tmp_path / "x.pth").format == "ignite"
    assert time.perf_counter() - start < 5
