"""What was measured, as tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.account import Account
from benchmarks.bounds import CLASSIC, OURS, Verdict
from benchmarks.contender import Kind
from benchmarks.error import ErrorRun
from benchmarks.error_bounds import ErrorVerdict
from benchmarks.import_time import BUDGET, NAME_BUDGET, ImportTime
from benchmarks.scaling import Curve
from benchmarks.suites import FLOAT32
from benchmarks.table import Table, digits, mark
from benchmarks.timing import Spread
from benchmarks.update import Measurement


def quartiles(time: Spread) -> str:
    return f"{digits(time.lower)} .. {digits(time.upper)}"


def update_table(measurement: Measurement) -> Table:
    """Columns without an entry are left out."""
    shape, suite = measurement.shape, measurement.suite
    peer, limit = measurement.fastest(Kind.PEER), measurement.fastest(Kind.LIMIT)
    cold = shape.num_calls > 1
    columns = {
        "contender": lambda row: row.contender.name,
        "median ms": lambda row: digits(row.time.median),
        "quartiles": lambda row: quartiles(row.time),
        "first of a turn": lambda row: digits(row.first.median) if cold else "",
        "of the limit": lambda row: f"{row.time.median / limit.time.median:.2f}" if limit else "",
        "of the fastest peer": lambda row: f"{row.time.median / peer.time.median:.2f}" if peer else "",
        "roundings": lambda row: "" if row.error is None else f"{row.error:.1f}",
    }
    rows = sorted(measurement.rows, key=lambda row: row.time.median)
    shown = {name: cell for name, cell in columns.items() if any(map(cell, rows))}
    notes = [suite.note] if suite.note else []
    if cold:
        notes.append("The median is of the calls that follow the first of a turn.")
    if measurement.device == "cuda":
        notes.append("From the call until the GPU is done." if cold else "The GPU's own time.")
    if measurement.left_out:
        notes.append(f"Left out: {', '.join(f'{name} ({why})' for name, why in measurement.left_out.items())}.")
    turns = f"{measurement.rounds} turns" + (f" of {shape.num_calls} calls" if cold else "")
    return Table(
        title=f"One update, {suite.title}, {shape.title}, {shape.entries} entries, {measurement.device}, {turns}",
        columns=list(shown),
        rows=[[cell(row) for cell in shown.values()] for row in rows],
        note=" ".join(notes),
    )


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    return Table(
        title="Must reach",
        columns=("averages", "model", "what", "beside", "bound", "measured", ""),
        rows=[
            (
                verdict.suite,
                verdict.shape,
                verdict.what,
                verdict.beside,
                verdict.bound,
                digits(verdict.value),
                mark(verdict.reached),
            )
            for verdict in verdicts
        ],
        num_text=4,
    )


def account_table(account: Account) -> Table:
    lines = [*account.parts.items(), ("rest: calls, checks, pending growth", account.rest)]
    return Table(
        title="Where one update of 1000 tensors of 32x32 spends the host's time",
        columns=("part", "microseconds", "share"),
        rows=[
            *((name, f"{time:.1f}", f"{time / account.whole:.0%}") for name, time in lines),
            ("update() in all", f"{account.whole:.1f}", "100%"),
        ],
    )


def error_table(run: ErrorRun) -> Table:
    decays = sorted({error.decay for error in run.errors})
    names = list(dict.fromkeys(error.name for error in run.errors))
    columns = ["average", *(f"decay {decay}" for decay in decays), *(f"bias {decay}" for decay in decays)]
    rows = []
    for name in names:
        found = [run.of(name, decay) for decay in decays]
        rows.append(
            [
                name,
                *(f"{error.relative:.1e}" if error else "" for error in found),
                *(f"{error.standard_errors:+.1f}" if error else "" for error in found),
            ]
        )
    return Table(
        title=f"Relative error after {run.steps} steps, {run.title}",
        columns=columns,
        rows=rows,
        note="Against float64 averages of the same run. Bias: the mean signed error, in standard errors of it."
        + (f" Left out: {', '.join(run.left_out)}." if run.left_out else ""),
    )


def error_verdict_table(verdicts: Sequence[ErrorVerdict]) -> Table:
    return Table(
        title="Errors must stay below",
        columns=("average", "bound", "measured", ""),
        rows=[
            (verdict.what, f"{verdict.bound:.1e}", f"{verdict.value:.1e}", mark(verdict.reached))
            for verdict in verdicts
        ],
    )


def curve_table(curve: Curve) -> Table:
    return Table(
        title=f"One update, median ms by the number of {curve.title}",
        columns=("contender", *(f"{size:,}" for size in curve.sizes)),
        rows=[(name, *map(digits, times)) for name, times in curve.milliseconds.items()],
    )


def import_table(measured: ImportTime, rounds: int) -> Table:
    lines = (
        ("import torch", measured.torch, ""),
        ("import torch, polyak", measured.both, ""),
        ("import polyak, torch loaded", measured.after_torch, f"{BUDGET:g} ms: {mark(measured.within_budget)}"),
        (
            "polyak.WeightAverage, after that",
            measured.first_name,
            f"{NAME_BUDGET:g} ms: {mark(measured.first_name.median <= NAME_BUDGET)}",
        ),
    )
    rows = [(name, f"{time.median:.0f}", f"{time.lower:.0f} .. {time.upper:.0f}", note) for name, time, note in lines]
    rows.append(("difference of the first two medians", f"{measured.added:.0f}", "", ""))
    return Table(
        title=f"Imports, {rounds} fresh processes each",
        columns=("statement", "median ms", "quartiles", "budget"),
        rows=rows,
    )


SHORT = {
    OURS: "`WeightAverage`",
    CLASSIC: "`ModelEma`",
    "timm ModelEmaV3": "timm V3",
    "torch AveragedModel": "torch",
    "ema-pytorch": "ema-pytorch",
    "torch-ema": "torch-ema",
    "diffusers EMAModel": "diffusers",
    "Lightning EMAWeightAveraging": "Lightning",
    "timm ModelEma": "timm ModelEma",
}


def short_table(updates: Iterable[Mapping[str, Any]]) -> Table:
    """For the README: medians in float32, one line a model, from the "updates" of a record that was written as JSON."""
    rows = []
    for update in updates:
        if update["averages"] != FLOAT32.title:
            continue
        medians = {name: digits(spread["median"]) for name, spread in update["milliseconds"].items()}
        rows.append((update["shape"], *(medians.get(name, "") for name in (*SHORT, update["limit"]))))
    return Table(title="In short, median ms", columns=("", *SHORT.values(), "flat limit"), rows=rows)
