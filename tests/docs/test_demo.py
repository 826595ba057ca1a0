"""The demo, cut short: what it exports is what it measured, and what it resumes is what it would have been."""

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import zoo

digits = pytest.importorskip("digits", reason="the demo needs scikit-learn and matplotlib")


@pytest.fixture(autouse=True)
def number_of_threads():
    before = torch.get_num_threads()  # the demo sets it
    yield
    torch.set_num_threads(before)


def invoke(output, *options):
    app = digits.typer.Typer()
    app.command()(digits.main)
    return CliRunner().invoke(app, ["--output", str(output), "--seeds", "1", *options], catch_exceptions=False)


def run(output, *options):
    result = invoke(output, *options)
    assert result.exit_code == 0, result.output
    return result.output


def table(printed):
    return [line for line in printed.splitlines() if "│" in line]


def flat(state, prefix=""):
    """The tensors of a nested state by the path to them; numbers and texts as tensors and names, too."""
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else None
    if items is None:
        return {f"{prefix} = {state!r}": torch.tensor(0)}
    return {name: tensor for key, value in items for name, tensor in flat(value, f"{prefix}/{key}").items()}


def test_a_resumed_demo_is_one_that_never_stopped(tmp_path):
    straight = run(tmp_path / "straight", "--epochs", "2")
    run(tmp_path / "resumed", "--epochs", "1")
    resumed = run(tmp_path / "resumed", "--epochs", "2", "--resume")

    exported = [load_file(tmp_path / name / "power-0.10.safetensors") for name in ("straight", "resumed")]
    assert zoo.bit_equal(*exported)
    states = [torch.load(tmp_path / name / "seed-0.pt", weights_only=True) for name in ("straight", "resumed")]
    for state in states:
        del state["seconds"]
    assert zoo.bit_equal(*map(flat, states))
    assert table(straight) == table(resumed)
    assert len(table(straight)) >= 4

    # A finished run has nothing to go on with, and shows the same again; one cannot go back.
    assert table(run(tmp_path / "resumed", "--epochs", "2", "--resume")) == table(straight)
    assert invoke(tmp_path / "resumed", "--epochs", "1", "--resume").exit_code == 2

    for printed in (straight, resumed):
        assert "loads strictly into a new model and has the same error" in " ".join(printed.split())
    for picture in ("curves.png", "profiles.png"):
        assert (tmp_path / "straight" / picture).stat().st_size > 10_000


def test_the_exported_average_errs_as_its_last_evaluation_says(tmp_path):
    run(tmp_path, "--epochs", "1")
    model = digits.build_model()
    model.load_state_dict(load_file(tmp_path / "power-0.10.safetensors"), strict=True)
    _, _, *test = digits.load_images()
    state = torch.load(tmp_path / "seed-0.pt", weights_only=True)
    assert digits.error_percent(model, *test) == state["errors"]["power 0.10"][-1]
    assert len(test[1]) == 897


def test_shifts_move_images_by_at_most_a_pixel():
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 4, 4] = 1
    moved = digits.shifted(image.expand(200, 1, 8, 8), torch.Generator().manual_seed(0))
    positions = {tuple(position) for position in moved.nonzero()[:, 2:].tolist()}
    assert positions == {(row, column) for row in (3, 4, 5) for column in (3, 4, 5)}
    assert moved.shape == (200, 1, 8, 8)
