"""`polyak convert`: what is printed, what is written, and how errors end."""

import subprocess
import sys

import pytest
import torch

import convert_cases as cases
import polyak
import zoo
from polyak.cli import main


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command; gives its exit code and what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["polyak", "convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        return end.value.code or 0, printed.out, " ".join(printed.err.replace("│", " ").split())

    return run


def test_a_file(command, tmp_path):
    case = cases.timm(tmp_path)
    code, out, _ = command(case.path, tmp_path / "out.pt", "--to", "torch", "--dtype", "bfloat16")
    assert code == 0
    assert out.splitlines() == [
        f"{case.path}: timm, average 'average'",
        f"{tmp_path / 'out.pt'}: torch, 9 tensors, 294 bytes",
        "  the input has no number of updates; n_averaged is set to 1: at 0 the next update would "
        "overwrite the average",
        "  torch files cannot hold: raw weights",
    ]
    assert polyak.read(tmp_path / "out.pt").average["0.weight"].dtype == torch.bfloat16


def test_a_folder(command, tmp_path):
    case = cases.timm(tmp_path)
    more = ("--config", cases.config(tmp_path), "--max-shard-size", "0.2kB", "--decay", "0.99")
    code, _, _ = command(case.path, tmp_path / "out", "--to", "diffusers", *more)
    assert code == 0
    assert (tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").exists()
    found = polyak.read(tmp_path / "out")
    assert found.decay == 0.99
    assert zoo.bit_equal(dict(found.average), case.average)


@pytest.mark.parametrize("as_json", [True, False])
def test_names(command, as_json, tmp_path):
    case = cases.torch_ema(tmp_path)
    names = [name for name, _ in case.model.named_parameters()]
    (tmp_path / "names").write_text(str(names).replace("'", '"') if as_json else "\n".join(names))
    code, out, _ = command(
        case.path, tmp_path / "out.safetensors", "--to", "safetensors", "--names", tmp_path / "names"
    )
    assert code == 0
    assert "if the model has any, are not in it; give its model to polyak.convert()" in out
    assert zoo.bit_equal(
        dict(polyak.read(tmp_path / "out.safetensors").average), {name: case.average[name] for name in names}
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "keras"], "--to 'keras' is unknown; there are safetensors, plain, huggingface, timm"),
        (["--to", "safetensors"], "--to 'safetensors' writes a file of safetensors; name it .safetensors"),
        (["--to", "torch-ema"], "in what order; give --names in the order of model.parameters()"),
        (["--to", "plain", "--dtype", "half a float"], "'half a float' is no dtype; take bfloat16"),
        (["--to", "plain", "--dtype", "int8"], "floating-point tensors cannot be cast to torch.int8"),
        (["--to", "plain", "--average", "long"], "--average 'long' is not in"),
        (["--to", "plain", "--decay", "-1"], "--decay -1.0 must be between 0 and 1"),
        (["--to", "plain", "--decay", "nan"], "--decay nan must be between 0 and 1"),
        (["--to", "plain", "--max-shard-size", "much"], "'much' is no size; write it as 5GB"),
        (["--to", "plain", "--format", "dit"], "is not of the format 'dit'"),
        ([], "Missing option '--to'"),
    ],
)
def test_errors_are_told_and_write_nothing(command, arguments, message, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    cases.timm(tmp_path)
    code, out, err = command(tmp_path / "last.pth.tar", tmp_path / "out.pth", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out.pth").exists()


def test_errors_of_the_system_are_told_in_words(command, tmp_path):
    cases.timm(tmp_path)
    code, out, err = command(tmp_path / "last.pth.tar", tmp_path, "--to", "huggingface")
    assert (code, out) == (2, "")
    assert "cannot be written: there is a folder with 1 entry; choose another name" in err
    assert "Errno" not in err


def test_the_program(tmp_path):
    case = cases.timm(tmp_path)
    program = [sys.executable, "-c", "from polyak.cli import main; main()", "convert"]
    done = subprocess.run([*program, case.path, tmp_path / "out.pth", "--to", "plain"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert zoo.bit_equal(torch.load(tmp_path / "out.pth"), case.average)
