"""The README says what is true: its example runs, its tests exist, its links lead somewhere."""

import re
from pathlib import Path

import pytest

import formats_table
from benchmarks import pages, speed
from benchmarks.records import records

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(examples) == 3
    names = {}
    for example in examples:
        exec(compile(example, "README.md", "exec"), names)
    assert (tmp_path / "model-ema.safetensors").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_the_examples_of_the_documentation_run(path, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, path.name, "exec"), {})
        printed = capsys.readouterr().out
        for promised in re.findall(r"#.* (\d+) and (\d+)$", example, re.MULTILINE):
            assert " ".join(promised) in printed


def test_the_table_of_formats_is_that_of_the_layouts():
    _, written, _ = formats_table.parts()
    assert written == formats_table.table(), "python tests/support/formats_table.py writes it anew"


def test_each_test_that_it_names_exists():
    named = re.findall(r"`(test_\w+)`", README)
    assert len(named) >= 10
    defined = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in named:
        assert f"def {name}(" in defined, name


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_its_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", path.read_text()):
        file, _, heading = target.partition("#")
        found = path.parent / file if file else path
        assert found.exists(), target
        assert not heading or heading in headings(found), target


def headings(path):
    """What GitHub makes of the headings of a page, for links to them."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_times_are_those_of_the_record():
    written = pages.made_text(pages.README, speed.MARK)
    assert written == speed.table(records()[speed.RECORD]), "python -m benchmarks.speed --write writes it anew"


def test_its_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile


def test_the_mean_ages_that_it_gives():
    import polyak

    assert round(polyak.Power(relative_std=0.10).mean_age(100)) == 11
    assert round(polyak.Power(relative_std=0.05).mean_age(100)) == 5
    assert round(polyak.Exponential(0.9999).mean_age(), -1) == 10_000
    assert polyak.Uniform().mean_age(100) == 50
