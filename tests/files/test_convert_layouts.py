"""From every layout that is read to every one that is written: the files that real libraries wrote."""

import re
from pathlib import Path
from typing import get_type_hints

import pytest

import convert_cases as cases
import polyak
import zoo
from library_files import CASES, FILES, case
from polyak.cli.convert import convert
from polyak.files.conversion import WRITTEN
from polyak.files.layouts import LAYOUTS

# What is no parameter of the models in these files, or the second name of one.
NO_PARAMETERS = ("running_mean", "running_var", "middle.1.weight")


# An adapter is no model: that is an error, with a test of its own.
@pytest.mark.parametrize(
    ("name", "to"), [(name, to) for name in CASES for to in cases.TARGETS if (name, to) != ("peft", "huggingface")]
)
def test_no_tensor_changes_on_the_way(name, to, tmp_path):
    about, averages, raw = case(name)
    output, config = tmp_path / cases.TARGETS[to], cases.config(tmp_path)
    for average, tensors in averages.items():
        names = about["names"] if about.get("positional") else None
        if to == "torch-ema" and names is None:
            order = polyak.read(FILES / name / about["path"]).averages[average]
            names = [name for name in order if not name.endswith(NO_PARAMETERS) and order[name].is_floating_point()]
        polyak.convert(FILES / name / about["path"], output, to=to, average=average, names=names, config=config)
        found = polyak.read(output, names=names if to == "torch-ema" else None)
        assert found.format == (to if to != "safetensors" else "polyak" if "polyak" in about["format"] else "plain")
        expected = {**raw, **tensors}
        if to == "torch-ema":
            expected = {name: expected[name] for name in names}
        elif to == "huggingface":
            # Tied tensors are under the first of their names.
            expected = {name: expected[name] for name in found.average}
        assert zoo.bit_equal(dict(found.average), expected)
        if output.is_dir():
            break


def test_the_table_of_layouts_says_what_can_be_written():
    assert {name for layout in LAYOUTS for name in layout.written} == WRITTEN.keys() == cases.TARGETS.keys()


def test_the_help_and_the_docstring_have_each_layout():
    told = get_type_hints(convert, include_extras=True)["to"].__metadata__[0].help
    assert set(re.findall(r"[\w-]+", told)) - {"or", "a", "file", "folder"} == WRITTEN.keys()
    about = polyak.convert.__doc__.partition(" to: ")[2].partition(" average: ")[0]
    assert set(re.findall(r'"([\w-]+)"', about)) == WRITTEN.keys()


def test_the_documentation_has_each_layout():
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    assert (
        re.findall(r"^\| `([a-z-]+)` \|", page, re.MULTILINE)[-len(WRITTEN) :] == list(WRITTEN) == list(cases.TARGETS)
    )
