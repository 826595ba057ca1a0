"""The README's table of formats, made from the layouts.

python tests/support/formats_table.py    writes it into the README
"""

from pathlib import Path

from polyak.files.layouts import LAYOUTS

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- formats: begin -->\n", "<!-- formats: end -->\n"
# Where the average is not to be said in a row.
_COMPUTED = {
    "composer": "`state/model/*` or `state/algorithms/?/1/ema_model/…`, by a flag",
    "schedule-free": "between `model/*` and `optimizer/state/?/z`",
    "key": "any key with `ema`, `swa`, `average`, … in it",
    "weights": "none",
}


def table() -> str:
    lines = [
        f"<details><summary>The {len(LAYOUTS)} formats</summary>\n",
        "| format | written by | the average | the raw weights |",
        "|---|---|---|---|",
    ]
    for layout in LAYOUTS:
        average = _COMPUTED.get(layout.name) or places(layout.average)
        raw = places(layout.raw) + (f" in `{layout.beside}` beside it" if layout.beside else "")
        lines.append(f"| `{layout.name}` | {layout.writer} | {average} | {raw} |")
    return "\n".join([*lines, "\n</details>\n"])


def places(patterns: tuple[str, ...]) -> str:
    return ", ".join(f"`{pattern}`" for pattern in patterns[:3]) + (", …" if len(patterns) > 3 else "")


def parts() -> tuple[str, str, str]:
    before, _, rest = README.read_text().partition(BEGIN)
    written, _, after = rest.partition(END)
    return before, written, after


if __name__ == "__main__":
    before, _, after = parts()
    README.write_text(before + BEGIN + table() + END + after)
