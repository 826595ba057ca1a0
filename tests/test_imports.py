"""The arrows of the house, what an import loads, and the names that it gives."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import polyak

# Each room imports from those before it. Whatever is not named here stands at the end, and nobody imports it.
ROOMS = """errors names profiles containers layouts inspection kernels shards collectives resharding entries watch
source replicas gathering store checkpoints adapters clock attach modules core syncing swapping state report exporting
view average batchnorm targets"""
HOUSE = [*ROOMS.split(), "model_ema", "cli", "__init__"]
WITHOUT_TORCH = ["errors", "names", "profiles", "containers", "layouts", "inspection", "clock"]
SOURCE = Path(polyak.__file__).parent


def imported(path):
    """The rooms that a file imports from, with whether it reaches past their doors."""
    folder = list(path.relative_to(SOURCE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = (node.module or "").split(".")
            if node.level:
                # One dot is the folder that the file is in.
                names = ["polyak", *folder[: len(folder) + 1 - node.level], *filter(None, names)]
            if names[0] == "polyak":
                assert len(names) > 1, f"{path} imports from the package itself"
                yield names[1], len(names) > 2
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("polyak") for alias in node.names), f"{path}: say from which room"


def test_imports_follow_the_order_of_the_house():
    for path in set(SOURCE.rglob("*.py")) - {SOURCE / "__init__.py"}:
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        for other, inside in imported(path):
            assert other == room or HOUSE.index(other) < HOUSE.index(room), f"{path} imports {other}"
            assert other == room or not inside, f"{path} imports from inside of {other}"


def modules(path):
    """Whatever a file imports by a full name, also within functions; its examples are not looked at."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


def test_rooms_know_what_they_may_know():
    without_torch = [
        path for room in WITHOUT_TORCH for path in [*SOURCE.glob(f"{room}/*.py"), *SOURCE.glob(f"{room}.py")]
    ]
    assert len(without_torch) > 30
    for path in without_torch:
        assert not any(name.partition(".")[0] == "torch" for name in modules(path)), path
    for path in (SOURCE / "kernels").rglob("*.py"):
        assert "nn." not in path.read_text(), path


def test_import_loads_torch_and_the_standard_library_only():
    code = (
        "import sys, torch; before = set(sys.modules); import polyak; [getattr(polyak, name) for name in dir(polyak)];"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(new - set(sys.stdlib_module_names) - {'polyak', 'torch'}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_training_does_without_the_formats_of_files():
    code = (
        "import sys, torch, polyak; model = torch.nn.Linear(2, 2); average = polyak.WeightAverage(model);"
        "average.update(); average.load_state_dict(average.state_dict()); average.swap_in(); average.swap_out();"
        "polyak.ModelEma(model).update(model);"
        "print([name for name in sys.modules if name.startswith(('polyak.checkpoints', 'polyak.layouts', "
        "'polyak.containers'))])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_plain_model_does_without_what_sharded_ones_need():
    code = (
        "import sys, torch, polyak; model = torch.nn.Linear(2, 2); average = polyak.WeightAverage(model);"
        "average.update(); average.state_dict(); average.swap_in(); average.swap_out();"
        "print([name for name in ('tensor', 'fsdp', 'checkpoint') if f'torch.distributed.{name}' in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_public_names_are_those_that_type_checkers_see():
    stub = (SOURCE / "__init__.pyi").read_text()
    told = {name: room for room, name in re.findall(r"^from \.(\w+) import (\w+) as \2$", stub, re.MULTILINE)}
    assert told == polyak._ROOMS
    for name in told:
        assert getattr(polyak, name) is not None
    with pytest.raises(AttributeError, match="module 'polyak' has no attribute 'nothing'"):
        polyak.nothing  # noqa: B018


def test_headers_are_read_without_torch():
    code = "import sys, polyak.layouts, polyak.containers; print('torch' in sys.modules, 'numpy' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]


def test_public_names():
    public = {name for name in dir(polyak) if not name.startswith("_")}
    rooms = {path.name.removesuffix(".py") for path in SOURCE.iterdir()}
    assert public - rooms == {
        "Attachment",
        "AverageView",
        "Checkpoint",
        "Conversion",
        "Exponential",
        "FileFormatError",
        "MismatchError",
        "ModelEma",
        "PolyakError",
        "Power",
        "Profile",
        "Report",
        "Schedule",
        "StateError",
        "Uniform",
        "WeightAverage",
        "convert",
        "dead_zone",
        "decay_to_half_life",
        "decay_to_mean_age",
        "decay_to_relative_std",
        "exponent_to_mean_age",
        "exponent_to_relative_std",
        "formats",
        "half_life_to_decay",
        "lerp_",
        "load",
        "mean_age_to_decay",
        "mean_age_to_exponent",
        "profile_from_description",
        "read",
        "recalibrate_batchnorm",
        "register_schedule",
        "relative_std_to_decay",
        "relative_std_to_exponent",
        "save",
        "scale_decay",
    }


@pytest.mark.protects
def test_a_checkout_that_is_not_installed_can_be_imported(tmp_path):
    shutil.copytree(SOURCE, tmp_path / "polyak", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    # -S leaves out the site-packages, which know the version of what is installed there.
    found = subprocess.run(
        [sys.executable, "-S", "-c", "import polyak, sys; print(polyak.__version__, 'torch' in sys.modules)"],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == ["0+unknown", "False"]
