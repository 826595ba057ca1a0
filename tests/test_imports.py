"""The floors of the house, what an import loads, and the names that it gives."""

import ast
import functools
import os
import pydoc
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import polyak

# A package imports from lower floors only, and by the other's door. `files` has several doors, each of which imports
# from those before it. All stand on the ground.
GROUND = ["errors", "names"]
FLOORS = [
    ["profiles"],
    ["kernels", "ranks"],
    ["model"],
    ["store", "files", "lerp", "batchnorm"],
    ["average", "model_ema"],
    ["cli"],
]
FILES = ["dtypes", "containers", "layouts", "inspection", "writing", "checkpoints", "conversion"]
WITHOUT_TORCH = ["errors", "names", "profiles", *(f"files/{package}" for package in FILES[:4])]
SOURCE = Path(polyak.__file__).parent
PATHS = sorted(set(SOURCE.rglob("*.py")) - {SOURCE / "__init__.py"})


def package_of(module):
    """The package by whose door a module is reached, given as a list of names after `polyak`."""
    return tuple(module[: 2 if module[0] == "files" else 1])


def module_of(path):
    return list(path.relative_to(SOURCE).with_suffix("").parts)


def height(package):
    """Where a package stands: nothing imports from what is as high as itself."""
    name, *inside = package
    floor = next((number for number, floor in enumerate(FLOORS, 1) if name in floor), 0)
    assert floor or name in GROUND, f"{name} has no floor"
    return floor, FILES.index(inside[0]) if inside else 0


def imported(path):
    """The modules of polyak that a file imports from, as lists of names after `polyak`, with the number of dots."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = (node.module or "").split(".")
            if node.level:
                yield [*module_of(path)[: -node.level], *filter(None, names)], node.level
            elif names[0] == "polyak":
                assert len(names) > 1, f"{path} imports from the package itself"
                yield names[1:], 0
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("polyak") for alias in node.names), f"{path}: say from which package"


def arrows():
    """Which packages import from which others."""
    found = {(package_of(module_of(path)), package_of(module)) for path in PATHS for module, _ in imported(path)}
    return {(importer, other) for importer, other in found if importer != other}


def test_packages_import_from_lower_floors():
    for importer, other in sorted(arrows()):
        assert height(other) < height(importer), f"{'/'.join(importer)} imports {'/'.join(other)}"


def test_packages_are_entered_by_their_doors():
    for path in PATHS:
        here = module_of(path)
        for module, dots in imported(path):
            if package_of(module) != package_of(here):
                assert dots == 0, f"{path}: {module} is another package, so its whole name is needed"
                assert tuple(module) == package_of(module), f"{path} imports from inside of {module}"
            else:
                inside = module[: len(here) - 1] == here[:-1]
                assert dots == int(inside), f"{path}: what is in its folder is imported by one dot, and nothing else"


def test_the_house_has_few_floors_and_doors():
    found = arrows()

    @functools.cache
    def floor(name):
        others = {other[0] for importer, other in found if importer[0] == name} - {name}
        return 1 + max(map(floor, others), default=0)

    doors = sorted({module_of(path)[0] for path in PATHS})
    lines = [len(path.read_text().splitlines()) for path in PATHS if path.name != "__init__.py"]
    num_floors = max(floor(package[0]) for arrow in found for package in arrow)
    print(f"{num_floors} floors, {len(found)} arrows, {len(doors)} doors: {', '.join(doors)}")
    print(f"{len(lines)} files, {sum(lines)} lines, {len(lines) / sum(lines) * 1000:.1f} files per 1000 lines")
    print(f"{sum(n < 40 for n in lines)} files below 40 lines, {sum(n > 420 for n in lines)} above 420")
    assert num_floors <= 6
    assert len(doors) <= 18


def modules(path):
    """Whatever a file imports by a full name, also within functions; its examples are not looked at."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


def test_packages_know_what_they_may_know():
    without_torch = [
        path for package in WITHOUT_TORCH for path in [*SOURCE.glob(f"{package}/*.py"), *SOURCE.glob(f"{package}.py")]
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
        "print([name for name in sys.modules if name.startswith('polyak.files')])"
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
    stub = ast.parse((SOURCE / "__init__.pyi").read_text())
    told = [alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(told) == polyak.__all__
    assert [name for name in dir(polyak) if not name.startswith("_")] == polyak.__all__
    for name in told:
        assert getattr(polyak, name) is not None
    with pytest.raises(AttributeError, match="module 'polyak' has no attribute 'nothing'"):
        polyak.nothing  # noqa: B018


def test_help_shows_the_public_names():
    text = pydoc.plain(pydoc.render_doc(polyak))
    assert "class WeightAverage" in text
    assert "lerp_(" in text
    assert not re.search(r"_(MODULES|LIST|import_module)", text)


def test_files_are_looked_at_without_torch():
    code = (
        "import sys, polyak.files.dtypes, polyak.files.layouts, polyak.files.containers, polyak.files.inspection;"
        "print('numpy' in sys.modules, 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]


def test_public_names():
    assert set(polyak.__all__) == {
        "Attachment",
        "Average",
        "AverageReport",
        "Checkpoint",
        "Conversion",
        "EntryReport",
        "Exponential",
        "FileFormatError",
        "MismatchError",
        "ModelEma",
        "Plan",
        "PolyakError",
        "Power",
        "Profile",
        "Report",
        "Rules",
        "Schedule",
        "StateError",
        "Tensors",
        "Uniform",
        "WeightAverage",
        "convert",
        "dead_zone",
        "formats",
        "lerp_",
        "load",
        "profile_from_description",
        "profiles",
        "read",
        "recalibrate_batchnorm",
        "register_schedule",
        "save",
    }


def test_the_profiles_are_there_after_a_bare_import_and_without_torch():
    code = "import sys, polyak; print(polyak.profiles.scale_decay(0.5, 2), 'torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["0.25", "False"]


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


@pytest.mark.protects
def test_a_wheel_has_all_that_an_import_needs(tmp_path):
    pytest.importorskip("setuptools")
    root = SOURCE.parents[1]
    if not (root / "setup.py").exists():
        pytest.skip("needs a checkout")
    shutil.copytree(root / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "wheels", "."]
    # Without a compiler, which is not what is asked here.
    environment = {**os.environ, "CC": "/nonexistent", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run(build, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    (wheel,) = (tmp_path / "wheels").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    installed = {path.relative_to(tmp_path / "installed") for path in (tmp_path / "installed").rglob("*.py")}
    assert installed == {path.relative_to(SOURCE.parent) for path in SOURCE.rglob("*.py")}
    code = "import polyak; print(polyak.__file__, [getattr(polyak, name) for name in polyak.__all__])"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(str(tmp_path / "installed"))
