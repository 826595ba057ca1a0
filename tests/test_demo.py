"""The demo, cut short: what it exports is what it measured, and what it resumes is what it would have been."""

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

import zoo

digits = pytest.importorskip("digits", reason="the demo needs scikit-learn and matplotlib")


def run(output, *options):
    app = digits.typer.Typer()
    app.command()(digits.main)
    result = CliRunner().invoke(app, ["--output", str(output), "--seeds", "1", *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_resumed_demo_is_one_that_never_stopped(tmp_path):
    straight = run(tmp_path / "straight", "--epochs", "2")
    run(tmp_path / "resumed", "--epochs", "1")
    resumed = run(tmp_path / "resumed", "--epochs", "2", "--resume")
    exported = [load_file(tmp_path / name / "power-0.10.safetensors") for name in ("straight", "resumed")]
    assert zoo.bit_equal(*exported)
    for output in (straight, resumed):
        assert "loads strictly into a new model and has the same error" in " ".join(output.split())
    tables = [[line for line in output.splitlines() if "│" in line] for output in (straight, resumed)]
    assert tables[0] == tables[1]
    assert len(tables[0]) >= 4
    for picture in ("curves.png", "profiles.png"):
        assert (tmp_path / "straight" / picture).stat().st_size > 10_000
