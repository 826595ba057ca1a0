"""`polyak inspect`: what is printed, what ends it, and files that would harm a terminal."""

import hashlib
import json
import math
import os
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import save_file

import hostile
from polyak import Uniform, WeightAverage
from polyak.cli import main
from polyak.cli.text import inert

RUN = [sys.executable, "-c", "from polyak.cli import main; main()"]


@pytest.fixture
def polyak(monkeypatch, capsys):
    """Runs the command: its exit code, what it prints, and its errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["polyak", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        return end.value.code or 0, printed.out, printed.err

    return run


def weights(factor=1.0):
    generator = torch.Generator().manual_seed(0)
    shapes = {"stem.weight": (8, 3), "stem.bias": (8,), "head.weight": (5, 8)}
    return {name: factor * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": weights(), "state_dict_ema": weights(1.5), "epoch": 3, "optimizer": {}}, path)
    return path


class TestPrinted:
    def test_table(self, polyak, checkpoint):
        code, out, err = polyak("inspect", checkpoint)
        assert (code, err) == (0, "")
        for text in (
            "timm: timm CheckpointSaver",
            "state_dict_ema/*",
            "float32 3",
            "epoch 3",
            "optimizer: dict of 0",
            "norm(average - raw) / norm(raw)\n",
            "every number is finite\n",
        ):
            assert text in out
        assert [line.split()[-1] for line in out.splitlines() if "all of it" in line] == ["0.5"]

    def test_json_is_all_there_is(self, polyak, checkpoint):
        code, out, err = polyak("inspect", "--json", "--verify", checkpoint)
        assert (code, err) == (0, "")
        told = json.loads(out, parse_constant=lambda text: pytest.fail(text))
        assert told["path"] == str(checkpoint)
        assert (told["kind"], told["format"], told["writer"]) == ("torch", "timm", "timm CheckpointSaver")
        assert told["num_bytes"] == checkpoint.stat().st_size
        assert told["sets"][0] == {
            "name": "average",
            "is_average": True,
            "where": ["state_dict_ema/*"],
            "files": ["checkpoint.pth"],
            "num_tensors": 3,
            "num_distinct": 3,
            "num_numbers": 72,
            "num_bytes": 288,
            "dtypes": {"float32": 3},
            "ties": [],
        }
        assert told["counters"] == {"epoch": 3}
        assert told["reading"] == {"num_numbers": 144, "num_read": 144}
        assert [each["module"] for each in told["distances"]] == [None, "stem", "head"]
        assert told["verification"]["problems"] == []
        assert told["others"] == [{"name": "optimizer", "kind": "dict of 0", "num_tensors": 0, "num_bytes": 0}]

    def test_a_part_of_a_large_file(self, polyak, tmp_path):
        header = {
            f"{prefix}.w": {"dtype": "F32", "shape": [1 << 28], "data_offsets": [place << 30, (place + 1) << 30]}
            for place, prefix in enumerate(("ema_model", "online_model"))
        }
        text = json.dumps(header).encode()
        with (tmp_path / "x.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            # Nothing but a hole, which takes no room on a disk.
            file.truncate(8 + len(text) + (2 << 30))
        code, out, _ = polyak("inspect", tmp_path / "x.safetensors")
        assert code == 0
        assert "norm(average - raw) / norm(raw), estimated from 3.12 % of the numbers\n" in out
        assert "every number is finite, of the 3.12 % that were looked at\n" in out

    def test_numbers_that_are_none(self, polyak, tmp_path):
        broken = weights()
        broken["stem.weight"][0] = math.nan
        torch.save({"state_dict": weights(), "state_dict_ema": broken}, tmp_path / "x.pth")
        code, out, _ = polyak("inspect", tmp_path / "x.pth")
        assert code == 0
        assert "numbers that are not finite\n" in out
        assert [line.split() for line in out.splitlines() if "stem.weight" in line] == [
            ["average", "stem.weight", "3", "0"]
        ]
        assert [line.split()[-2:] for line in out.splitlines() if line.split()[:1] == ["stem"]] == [["not", "finite"]]

    def test_names_from_a_file(self, polyak, tmp_path):
        torch.save({"shadow_params": [torch.ones(2), torch.ones(3)], "num_updates": 1, "decay": 0.9}, tmp_path / "x.pt")
        assert "positions; give --names" in polyak("inspect", tmp_path / "x.pt")[1]
        for text in ('["a", "b"]', "a\nb\n"):
            (tmp_path / "names").write_text(text)
            code, out, _ = polyak("inspect", "--names", tmp_path / "names", tmp_path / "x.pt")
            assert code == 0
            assert "missing" not in out
        (tmp_path / "names").write_text("[1, 2]")
        assert polyak("inspect", "--names", tmp_path / "names", tmp_path / "x.pt")[0] == 2
        (tmp_path / "names").write_text("a\nb\nc\n")
        code, _, err = polyak("inspect", "--names", tmp_path / "names", tmp_path / "x.pt")
        assert code == 2
        assert "x.pt' has 2 tensors without names, and there are 3 names for them: 'a', 'b', 'c'." in err


class TestVerify:
    def test_whole(self, polyak, checkpoint):
        code, out, _ = polyak("inspect", "--verify", checkpoint)
        with zipfile.ZipFile(checkpoint) as archive:
            count = len(archive.infolist())
        assert code == 0
        assert f"{count} of {count} checksums fit" in out

    @pytest.mark.protects
    def test_a_bit_that_was_flipped(self, polyak, checkpoint):
        data = bytearray(checkpoint.read_bytes())
        place = data.index(struct.pack("<f", float(weights()["stem.weight"][2, 1])))
        data[place] ^= 1
        checkpoint.write_bytes(data)
        assert polyak("inspect", checkpoint)[0] == 0
        code, out, err = polyak("inspect", "--verify", checkpoint)
        assert (code, err) == (1, "")
        assert [line.split() for line in out.splitlines() if "CRC32" in line] == [
            ["checkpoint.pth", "checkpoint/data/0", "its", "bytes", "do", "not", "fit", "its", "CRC32"]
        ]
        code, out, _ = polyak("inspect", "--verify", "--json", checkpoint)
        assert code == 1
        problem = {"file": "checkpoint.pth", "record": "checkpoint/data/0", "problem": "its bytes do not fit its CRC32"}
        assert json.loads(out)["verification"]["problems"] == [problem]

    def test_without_checksums(self, polyak, tmp_path):
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(weights(), tmp_path / "x.pth")
        finally:
            torch.serialization.set_crc32_options(True)
        code, out, _ = polyak("inspect", "--verify", tmp_path / "x.pth")
        assert code == 0
        assert "there was no checksum to compare with\n 'x.pth' was written without checksums\n" in out
        torch.save(weights(), tmp_path / "y.pth", _use_new_zipfile_serialization=False)
        assert "'y.pth' has no checksums\n" in polyak("inspect", "--verify", tmp_path / "y.pth")[1]
        save_file(weights(), tmp_path / "z.safetensors")
        out = polyak("inspect", "--verify", tmp_path / "z.safetensors")[1]
        assert "'z.safetensors' has no checksums: of safetensors files only those that polyak wrote have them\n" in out

    def test_checksums_of_an_export(self, polyak, tmp_path):
        path = tmp_path / "x.safetensors"

        def saved(checksums):
            save_file(weights(), path, {"polyak.checksums": checksums})
            return polyak("inspect", "--verify", path)[:2]

        # The first digits of: sha256sum of the little-endian bytes of each tensor.
        good = {name: _sha256(tensor) for name, tensor in weights().items()}
        code, out = saved(json.dumps(good))
        assert code == 0
        assert "3 of 3 checksums fit, 288 bytes\n" in out
        code, out = saved(json.dumps({**good, "stem.bias": "0" * 16}))
        assert code == 1
        assert "2 of 3 checksums fit" in out
        assert "stem.bias   its bytes do not fit its SHA-256" in out
        code, out = saved(json.dumps({**good, "other": "0" * 16}))
        assert (code, "has a checksum, and is not in the file" in out) == (1, True)
        code, out = saved(json.dumps({"stem.bias": good["stem.bias"]}))
        assert (code, "'x.safetensors' has no checksums of 2 tensors" in out) == (0, True)
        code, out = saved("[")
        assert (code, "is no JSON of a dictionary" in out) == (1, True)

    @pytest.mark.protects
    def test_an_export(self, polyak, tmp_path):
        model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        average = WeightAverage(model, Uniform())
        average.update()
        path = tmp_path / "x.safetensors"
        average.export(path)
        code, out, _ = polyak("inspect", "--verify", path)
        assert (code, "7 of 7 checksums fit" in out) == (0, True)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        code, out, _ = polyak("inspect", "--verify", path)
        assert (code, "6 of 7 checksums fit" in out) == (1, True)

    @pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
    def test_distributed(self, polyak, tmp_path):
        from torch.distributed import checkpoint

        state = {"a.w": torch.arange(100.0), "b": torch.ones(3)}
        checkpoint.save(state, storage_writer=checkpoint.FileSystemWriter(tmp_path / "dcp"), no_dist=True)
        code, out, _ = polyak("inspect", "--verify", tmp_path / "dcp")
        assert (code, "checksums fit" in out) == (0, True)
        (file,) = (tmp_path / "dcp").glob("*.distcp")
        data = bytearray(file.read_bytes())
        data[data.index(struct.pack("<3f", 50, 51, 52))] ^= 1
        file.write_bytes(data)
        code, out, _ = polyak("inspect", "--verify", tmp_path / "dcp")
        assert (code, "its bytes do not fit its CRC32" in out) == (1, True)


def _sha256(tensor):
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]


class TestErrors:
    def one_line(self, result):
        code, out, err = result
        assert (code, out) == (2, "")
        assert err.startswith("polyak: ")
        assert err.count("\n") == 1
        return err

    def test_what_is_not_there(self, polyak, tmp_path):
        err = self.one_line(polyak("inspect", tmp_path / "nothing.pth"))
        assert "nothing.pth': No such file or directory" in err

    def test_a_folder_and_another_file(self, polyak, tmp_path):
        assert "is a folder without weights" in self.one_line(polyak("inspect", "--json", tmp_path))
        (tmp_path / "x.txt").write_text("hello")
        assert "is neither a file of torch.save nor" in self.one_line(polyak("inspect", tmp_path / "x.txt"))

    def test_a_damaged_file(self, polyak, checkpoint):
        checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
        assert "checkpoint.pth' is damaged" in self.one_line(polyak("inspect", checkpoint))

    def test_options_go_by_their_names(self, polyak, checkpoint, tmp_path):
        assert "--format 'x' is unknown" in self.one_line(polyak("inspect", "--format", "x", checkpoint))
        pickled = hostile.dictionary(state_dict=hostile.called("os.system", "true"))
        hostile.archive(tmp_path / "x.pth", pickled)
        err = self.one_line(polyak("inspect", tmp_path / "x.pth"))
        assert "holds the object os.system" in err
        assert "--skip-objects reads" in err

    def test_usage(self, polyak):
        code, out, err = polyak("inspect", "--nonsense", "x")
        assert (code, out) == (2, "")
        assert "No such option" in err
        assert polyak("--version")[:2] == (0, "0.1.0\n")
        assert "--skip-objects" in polyak("inspect", "--help")[1]


class TestHostile:
    NAMES = ("[red]x[/red]", "\x1b[2Jy", "a\nb", "\u202etxt", "\ud800", "z" * 100_000, ":smile:", "\x00\x07", "")

    def test_text_is_inert(self):
        for name in self.NAMES:
            assert inert(name).isprintable()
            assert len(inert(name)) <= 80 * 6

    @pytest.mark.protects
    def test_names_do_nothing_to_a_terminal(self, polyak, tmp_path):
        tensors = {f"{name}.{name}": torch.full((3,), math.nan) for name in self.NAMES}
        content = {"state_dict": tensors, "state_dict_ema": tensors, **dict.fromkeys(self.NAMES, "x"), "epoch": 1 << 70}
        torch.save(content, tmp_path / "x.pth")
        code, out, err = polyak("inspect", tmp_path / "x.pth")
        assert (code, err) == (0, "")
        assert all(line.isprintable() and len(line) <= 200 for line in out.split("\n"))
        assert "[red]x[/red]" in out
        assert ":smile:" in out
        told = json.loads(polyak("inspect", "--json", tmp_path / "x.pth")[1])
        assert {each["name"] for each in told["nonfinite"]} == set(tensors)
        assert told["counters"]["epoch"] == "an integer of 71 bits"

    def test_a_tree_without_end(self, polyak, tmp_path):
        content = {"state_dict": weights(), "state_dict_ema": weights()}
        twice = []
        for _ in range(100):
            twice = [twice, twice]
        content |= {"itself": content, "twice": twice, "many": [weights()["stem.bias"]] * 1000}
        torch.save(content, tmp_path / "x.pth")
        code, out, _ = polyak("inspect", tmp_path / "x.pth")
        assert code == 0
        assert "many: list of 1000, 1 tensor, 32 bytes" in out.replace("1,000", "1000")

    def test_a_deep_tree(self, polyak, tmp_path):
        deep = b"]" * 100_000 + hostile.tensor() + b"a" * 100_000
        pickled = hostile.dictionary(
            state_dict_ema=hostile.dictionary(w=hostile.tensor())[2:-1],
            state_dict=hostile.dictionary(w=hostile.tensor())[2:-1],
            deep=deep,
        )
        hostile.archive(tmp_path / "x.pth", pickled)
        code, out, _ = polyak("inspect", tmp_path / "x.pth")
        assert code == 0
        assert "deep: list of 1, 1 tensor, 24 bytes" in out

    def test_a_profile_without_end(self, polyak, tmp_path):
        twice = []
        for _ in range(100):
            twice = [twice, twice]
        state = {
            "averages": {"x": {"a": weights()}},
            "clock": {"time": 1e400, "num_updates": 1},
            "configuration": {"profiles": {"a": {"profile": "power", "exponent": twice}}},
        }
        torch.save(state, tmp_path / "x.pt")
        code, out, _ = polyak("inspect", tmp_path / "x.pt")
        assert (code, "not understood" in out) == (0, True)


class TestProcess:
    @pytest.mark.protects
    def test_torch_is_not_imported(self, tmp_path, checkpoint):
        save_file(weights(), tmp_path / "x.safetensors")
        for arguments in (
            ["--version"],
            ["inspect", "--help"],
            ["inspect", "--verify", checkpoint],
            ["inspect", "--json", tmp_path / "x.safetensors"],
        ):
            code = "import atexit; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); main()"
            done = subprocess.run(
                [sys.executable, "-c", f"import sys; from polyak.cli import main; {code}", *map(str, arguments)],
                capture_output=True,
                text=True,
                check=True,
            )
            assert "polyak.cli.app" in done.stderr.split()
            assert "torch" not in done.stderr.split()

    def test_an_ascii_terminal(self, tmp_path):
        torch.save(
            {"state_dict": {"größe": torch.ones(2)}, "state_dict_ema": {"größe": torch.ones(2)}}, tmp_path / "x.pth"
        )
        done = subprocess.run(
            [*RUN, "inspect", tmp_path / "x.pth"],
            capture_output=True,
            env={**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
            check=True,
        )
        assert rb"gr\xf6\xdfe" in done.stdout
        assert done.stderr == b""

    def test_whoever_reads_it_may_stop(self, checkpoint):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run([*RUN, "inspect", checkpoint], stdout=write, stderr=subprocess.PIPE, check=False)
        os.close(write)
        assert (done.returncode, done.stderr) == (1, b"")
