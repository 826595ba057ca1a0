"""Made text in pages: what is between the marks `<!-- name: begin -->` and `<!-- name: end -->`."""

from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def made_text(page: Path, name: str) -> str:
    """The text between the marks."""
    return _split(page, name)[1]


def write_text(page: Path, name: str, text: str) -> None:
    """Replaces the text between the marks."""
    before, _, after = _split(page, name)
    page.write_text(before + text + after)


def _split(page: Path, name: str) -> tuple[str, str, str]:
    before, begin, rest = page.read_text().partition(f"<!-- {name}: begin -->\n")
    text, end, after = rest.partition(f"<!-- {name}: end -->\n")
    assert begin, f"{page}: no mark {name}"
    assert end, f"{page}: no end of {name}"
    return before + begin, text, end + after
