"""The benchmarks' own arithmetic: medians, ratios, marks, and that nobody is timed who did not average."""

import io
import json
import math
import os
from dataclasses import replace
from functools import partial

import pytest
import torch
from rich.console import Console
from torch import distributed, nn

import benchmarks.__main__ as commands
from benchmarks import account, host, inspect_large, language, limits, ours, peers, scaling, sharded, shardings
from benchmarks.bounds import CPU_BOUNDS, GPU_BOUNDS, verdicts
from benchmarks.check import check, move
from benchmarks.contender import DECAY, Contender, Kind, Pair, Running, pairs_by_every_name, pairs_by_name
from benchmarks.error import DECAYS, NOISY_DECAY, Error, ErrorRun, compare, training_run
from benchmarks.error_bounds import BOUNDS, error_verdicts
from benchmarks.followers import COMPENSATED, FOLLOWERS, PLAIN, STOCHASTIC, FollowerRow
from benchmarks.limits import FLAT_FORMS, copy_of, lerp_of
from benchmarks.records import write_atomically
from benchmarks.results import Results, as_record, write
from benchmarks.shapes import SHAPES, Shape, one_tensor, small_tensors
from benchmarks.suites import FLOAT32, SUITES
from benchmarks.table import digits, mark
from benchmarks.tables import error_table, short_table, update_table, verdict_table
from benchmarks.timing import LEAST_ROUNDS, Spread, in_turn, spread
from benchmarks.update import NO_MEMORY, Measurement, Row, measure

TINY = Shape("small", "3 tensors of 32x32", 3, 1, partial(small_tensors, 3), num_calls=3)
WEIGHT_AVERAGE = Contender("polyak.WeightAverage", Kind.OURS, ours.weight_average)


def test_spread_is_the_median_and_the_quartiles():
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0)


def test_each_takes_its_turn_with_all_its_calls():
    called = []
    turns = in_turn({name: partial(called.append, name) for name in "ab"}, 4, num_calls=3)
    assert {len(turn.first) for turn in turns.values()} == {len(turn.time) for turn in turns.values()} == {4}
    assert len(called) == 2 * 4 * 3
    assert all(len(set(called[start : start + 3])) == 1 for start in range(0, len(called), 3))


def test_no_round_begins_after_the_time_is_up_but_for_the_first_few():
    assert len(in_turn({"a": lambda: None}, 100, seconds=0.0)["a"].time) == LEAST_ROUNDS


def test_three_digits_and_marks():
    assert [digits(value) for value in (0.0, 0.08349, 2.5, 20.34, 443.4, 12345.0)] == [
        "0",
        "0.0835",
        "2.50",
        "20.3",
        "443",
        "12345",
    ]
    assert (mark(True), mark(False)) == ("pass", "short")


# Ratios and marks.


def row(name, kind, time):
    return Row(Contender(name, kind, lambda model: None), Spread(2 * time, time, time), Spread(time, time, time), 0.1)


def measurement(**times):
    kinds = {"ours": Kind.OURS, "peer": Kind.PEER, "slow_peer": Kind.PEER, "seed": Kind.SEED, "limit": Kind.LIMIT}
    names = {"ours": "polyak.WeightAverage"}
    rows = [row(names.get(name, name), kinds[name], time) for name, time in times.items()]
    return Measurement(FLOAT32, TINY, "cpu", 3072, 1, rows, {"a large one": NO_MEMORY})


def test_verdicts_compare_with_the_fastest_peer_the_seed_and_the_limit():
    found = verdicts([measurement(ours=0.2, peer=5.0, slow_peer=8.0, seed=15.0, limit=0.1)])
    assert {(verdict.what, verdict.value, verdict.reached, verdict.beside) for verdict in found} == {
        ("times as fast as the fastest peer", 25.0, True, "peer"),
        ("times as fast as the seed's formula", 75.0, False, ""),
        ("microseconds of update() in all", 200.0, True, ""),
    }
    cells = [cell for line in verdict_table(found).rows for cell in line]
    assert cells.count("pass") == 2
    assert cells.count("short") == 1


def test_no_verdict_where_somebody_is_missing():
    assert [verdict.what for verdict in verdicts([measurement(ours=0.2)])] == ["microseconds of update() in all"]


def test_update_table_has_ratios_to_limit_and_peer_and_says_who_was_left_out():
    table = update_table(measurement(ours=0.2, peer=5.0, limit=0.1))
    assert list(table.columns) == [
        "contender",
        "median ms",
        "quartiles",
        "first of a turn",
        "of the limit",
        "of the fastest peer",
        "roundings",
    ]
    assert list(table.rows[1]) == ["polyak.WeightAverage", "0.200", "0.200 .. 0.200", "0.400", "2.00", "0.04", "0.1"]
    assert "Left out: a large one (not enough memory)." in table.note
    assert "of the limit" not in update_table(measurement(ours=0.2)).columns


def test_short_table_is_made_from_what_was_written():
    written = json.loads(json.dumps([as_record(measurement(ours=0.2, limit=0.1))]))
    table = short_table(written)
    assert table.rows[0][:2] == ("3 tensors of 32x32", "0.200")
    assert table.rows[0][-1] == "0.100"
    assert table.rows_in_markdown().endswith("| 0.100 |")


def test_every_bound_is_about_something_that_is_timed():
    shapes = {shape.name: shape for shape in SHAPES}
    for device, bounds in (("cpu", CPU_BOUNDS), ("cuda", GPU_BOUNDS)):
        for bound in bounds:
            assert (bound.least is None) != (bound.most is None)
            contenders = bound.suite.all_contenders(torch.device(device))
            rows = [row(contender.name, contender.kind, 1.0) for contender in contenders]
            for name in bound.shapes:
                assert name in bound.suite.shapes
                assert device == "cuda" or not shapes[name].on_gpu_only
                timed = Measurement(bound.suite, shapes[name], device, 1, 1, rows, {})
                assert bound.value(timed) in (1.0, 100.0, 1000.0)


def test_names_are_unique():
    assert len({suite.name for suite in SUITES}) == len(SUITES)
    for suite in SUITES:
        names = [contender.name for contender in suite.all_contenders(torch.device("cpu"))]
        assert len(set(names)) == len(names)


# Whoever is timed has averaged.


def run_and_check(build, *, dtype=torch.float32, shape=TINY, updates=20):
    contender = Contender("it", Kind.PEER, build)
    model = shape.model(dtype=dtype)
    running = build(model)
    running.update()
    move(running.pairs())
    for _ in range(updates):
        running.update()
    return check(contender, running.pairs(), updates, sum(parameter.numel() for parameter in model.parameters()))


def loop(step, *, dtype=None):
    """A contender that calls `step(average, source)` for each pair."""

    def build(model):
        averages = {name: tensor.to(dtype or tensor.dtype, copy=True) for name, tensor in model.state_dict().items()}

        @torch.no_grad()
        def update():
            for name, source in model.state_dict().items():
                step(averages[name], source)

        return Running(update, lambda: pairs_by_name(averages, model))

    return build


def lerp(average, source, weight=1 - DECAY):
    average.lerp_(source.to(average.dtype), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_accepts_the_formula(dtype):
    assert run_and_check(loop(lerp, dtype=torch.float32), dtype=dtype) < 1


@pytest.mark.parametrize(
    "step",
    [lambda average, source: None, lambda average, source: average.copy_(source), partial(lerp, weight=1e-3)],
    ids=["nothing", "copy", "another decay"],
)
def test_check_refuses_another_formula(step):
    with pytest.raises(RuntimeError, match="is off by"):
        run_and_check(loop(step))


def test_check_refuses_who_left_tensors_out():
    def build(model):
        running = loop(lerp)(model)
        return Running(running.update, lambda: running.pairs()[:-1])

    with pytest.raises(RuntimeError, match="averages 2048 of 3072 elements"):
        run_and_check(build)


def test_check_refuses_averages_in_bfloat16_that_are_rounded_to_nearest():
    with pytest.raises(RuntimeError, match="standard errors in the mean"):
        run_and_check(loop(lerp), dtype=torch.bfloat16)


def test_check_accepts_stochastic_rounding():
    generator = torch.Generator().manual_seed(0)

    def step(average, source):
        exact = average.float().lerp(source.float(), 1 - DECAY)
        noise = torch.randint(1 << 16, exact.shape, generator=generator, dtype=torch.int32)
        average.copy_(((exact.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32))

    run_and_check(loop(step), dtype=torch.bfloat16)


def test_to_move_a_model_is_exact_in_bfloat16():
    model = TINY.model(dtype=torch.bfloat16)
    before = {name: tensor.double() for name, tensor in model.state_dict().items()}
    move(Pair(tensor, tensor) for tensor in model.state_dict().values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.double(), before[name] + 1)


def test_a_tied_tensor_counts_as_often_as_a_loop_over_names_averages_it():
    model = nn.ModuleDict({"one": nn.Linear(2, 2, bias=False), "two": nn.Linear(2, 2, bias=False)})
    model["two"].weight = model["one"].weight
    averages = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert [pair.times for pair in pairs_by_every_name(averages, model)] == [2]
    assert [pair.times for pair in pairs_by_name(averages, model)] == [1]


@pytest.mark.parametrize("name", FLAT_FORMS)
def test_flat_limits_average(name):
    run_and_check(FLAT_FORMS[name])
    if name != "flat lerp_":  # which takes one dtype
        run_and_check(FLAT_FORMS[name], dtype=torch.bfloat16)


@pytest.mark.parametrize("build", [copy_of, lerp_of])
def test_limits_that_only_move_bytes_have_nothing_to_check(build):
    contender = Contender("bytes", Kind.LIMIT, partial(build, bytes_per_parameter=12))
    assert [row.error for row in measure(FLOAT32, TINY, contenders=[contender]).rows] == [None]


@pytest.mark.parametrize("build", [ours.weight_average, ours.model_ema, ours.compensated, ours.stochastic])
def test_every_mode_averages(build):
    run_and_check(build, dtype=torch.bfloat16 if build is ours.stochastic else torch.float32)


@pytest.mark.parametrize("build", [ours.together, ours.separately])
def test_several_profiles_are_checked_with_their_own_decays(build):
    run_and_check(partial(build, count=3))


def test_one_turn_of_a_small_contender():
    seed = Contender("the seed's formula", Kind.SEED, peers.seed_formula)
    measured = measure(FLOAT32, TINY, rounds=1, contenders=[WEIGHT_AVERAGE, seed])
    assert [row.contender for row in measured.rows] == [WEIGHT_AVERAGE, seed]
    assert measured.parameters == 3072
    assert all(row.time.median > 0 for row in measured.rows)


def test_what_does_not_fit_into_memory_is_left_out(monkeypatch):
    """Of other libraries twice as much is expected: they make temporaries."""
    averages = 3072 * 4
    kinds = {"one": Kind.OURS, "two": Kind.OURS, "three": Kind.OURS, "theirs": Kind.PEER}
    contenders = [Contender(name, kind, ours.weight_average) for name, kind in kinds.items()]
    for free, left_out in ((averages - 1, ["three", "theirs"]), (averages, ["theirs"]), (2 * averages, [])):
        monkeypatch.setattr("benchmarks.update.free_bytes", lambda device, free=free: free)
        found = measure(FLOAT32, TINY, contenders=contenders)
        assert found.left_out == dict.fromkeys(left_out, NO_MEMORY)


def out_of_memory(*_):
    raise torch.OutOfMemoryError


def wrong(*_):
    raise TypeError("no such argument")


def missing(*_):
    import no_such_library  # noqa: F401


def runs_out(model, calls):
    """A contender that runs out of memory when it is called once more than that."""
    running = ours.weight_average(model)
    left = iter(range(calls))
    return Running(lambda: running.update() if next(left, None) is not None else out_of_memory(), running.pairs)


@pytest.mark.parametrize(
    ("build", "kind", "why"),
    [
        (missing, Kind.PEER, "ModuleNotFoundError: No module named 'no_such_library'"),
        (wrong, Kind.PEER, "TypeError: no such argument"),
        (out_of_memory, Kind.PEER, NO_MEMORY),
        (out_of_memory, Kind.OURS, NO_MEMORY),
        (partial(runs_out, calls=1), Kind.OURS, NO_MEMORY),
        (lambda model: Running(ours.weight_average(model).update, out_of_memory), Kind.OURS, NO_MEMORY),
    ],
)
def test_who_cannot_take_part_is_left_out_and_the_others_are_timed(build, kind, why):
    found = measure(FLOAT32, TINY, rounds=1, contenders=[Contender("it", kind, build), WEIGHT_AVERAGE])
    assert found.left_out == {"it": why}
    assert [row.contender for row in found.rows] == [WEIGHT_AVERAGE]
    assert f"Left out: it ({why})." in update_table(found).note


def test_an_error_of_this_library_is_no_reason_to_leave_it_out():
    with pytest.raises(TypeError, match="no such argument"):
        measure(FLOAT32, TINY, rounds=1, contenders=[Contender("it", Kind.OURS, wrong)])


@pytest.mark.protects
@pytest.mark.parametrize(
    "build",
    [
        ours.weight_average,
        ours.compensated,
        ours.stochastic,
        partial(ours.together, count=2),
        partial(ours.separately, count=2),
        limits.flat_average,
    ],
)
def test_the_check_makes_no_copy_of_the_averages(build):
    running = build(TINY.model())
    running.update()
    one, other = ({pair.average.data_ptr() for pair in running.pairs()} for _ in range(2))
    assert one == other


def test_the_account_is_complete():
    found = account.measure(3)
    assert list(found.parts) == ["check that the source is the same", "clock and growth", "kernel"]
    assert sum(found.parts.values()) + found.rest == pytest.approx(found.whole)


# Errors against float64.


def test_compare_gives_relative_error_and_bias():
    exact = torch.ones(4, dtype=torch.float64)
    error = compare("it", 0.9, exact + torch.tensor([0.1, -0.1, 0.1, -0.1], dtype=torch.float64), exact)
    assert error.relative == pytest.approx(0.1)
    assert error.standard_errors == pytest.approx(0, abs=1e-9)
    biased = compare("it", 0.9, exact + torch.tensor([0.1, 0.3, 0.1, 0.3], dtype=torch.float64), exact)
    assert biased.standard_errors == pytest.approx(0.2 / (math.sqrt(0.04 / 3) / 2))


def test_error_bounds_are_of_rows_and_decays_that_exist():
    names = {follower.name for follower in FOLLOWERS}
    assert {PLAIN, COMPENSATED, STOCHASTIC} <= names
    assert {bound.decay for bound in BOUNDS} <= {*DECAYS, NOISY_DECAY}


@pytest.mark.parametrize(("error", "reached"), [(1e-5, True), (2e-5, False)])
def test_error_verdicts(error, reached):
    run = ErrorRun("a run", 10, [Error(PLAIN, 0.9999, error, 0.0)])
    assert [verdict.reached for verdict in error_verdicts([run])] == [reached]


def test_training_run_in_float64_has_no_error_and_in_bfloat16_does_not_move():
    rows = [row for row in FOLLOWERS if row.name in ("polyak, float64", PLAIN, "nearest bfloat16")]
    run = training_run(30, rows)
    assert run.of("polyak, float64", 0.999).relative < 1e-14
    assert 1e-10 < run.of(PLAIN, 0.999).relative < 1e-5
    assert run.of("nearest bfloat16", 0.999).relative > 1e-3
    assert "decay 0.999" in error_table(run).columns


def test_a_follower_whose_library_is_missing_is_left_out_by_name():
    run = training_run(30, [FollowerRow("theirs", missing), FOLLOWERS[2]])
    assert [error.name for error in run.errors] == [FOLLOWERS[2].name] * len(DECAYS)
    assert error_table(run).note.endswith("Left out: theirs.")


def test_a_follower_that_does_nothing_is_seen():
    still = FollowerRow("still", lambda model, decays: FOLLOWERS[2].build(model, decays))
    moving = training_run(30, [still]).of("still", 0.999).relative
    asleep = FollowerRow("asleep", lambda model, decays: asleep_follower(model, decays))
    assert training_run(30, [asleep]).of("asleep", 0.999).relative > 1000 * moving


def asleep_follower(model, decays):
    follower = FOLLOWERS[2].build(model, decays)
    return type(follower)(lambda: None, follower.averages)


# Several ranks.


def test_sharded_ratios_are_of_the_share_that_a_rank_has():
    ranks = [
        {"own": [1.0, 2.0], "other": [4.0, 6.0], "own_bytes": 10, "other_bytes": 40},
        {"own": [2.0, 3.0], "other": [4.0, 6.0], "own_bytes": 12, "other_bytes": 40},
    ]
    fsdp2, divided = (
        sharded.measured(row, "it", ranks, ranks=2)
        for row in sorted(shardings.COMPARISONS, key=lambda row: row.divided)
    )
    assert (fsdp2.time_ratio, fsdp2.bytes_ratio) == (0.4, 0.3)
    assert (divided.time_ratio, divided.bytes_ratio) == (0.8, 0.6)
    assert (divided.ranks, divided.rounds) == (2, 2)
    again = sharded.measured(shardings.COMPARISONS[0], "it", [*ranks, *ranks], ranks=2)
    assert (again.ranks, again.rounds) == (2, 4)
    cells = [cell for line in sharded.table([fsdp2, divided]).rows for cell in line]
    assert cells.count("pass, <= 1.2") == 2


@pytest.fixture
def one_rank():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.usefixtures("one_rank")
def test_averages_on_ranks_are_compared_and_checked(monkeypatch):
    average_of = shardings.average_of
    monkeypatch.setattr(shardings, "average_of", lambda model, shard_over=None: average_of(model))
    for comparison in shardings.COMPARISONS:
        found = sharded.time_both(comparison, TINY, torch.device("cpu"), rounds=2)
        assert len(found["own"]) == len(found["other"]) == 2
        assert found["own_bytes"] == found["other_bytes"] == 3 * 32 * 32 * 4
        sides = comparison.build(TINY, torch.device("cpu"))
        sides.move()
        sides.own.update()
        with pytest.raises(RuntimeError, match="not the same, beginning with '0'"):
            sides.check()


@pytest.mark.skipif(not distributed.is_available(), reason="needs torch.distributed")
def test_updates_on_two_ranks_are_timed_and_end_as_the_same_numbers():
    found = sharded.measure(2, ["small"], rounds=2)
    assert {row.what for row in found} == {row.title for row in shardings.COMPARISONS}
    assert all(row.time.median > 0 and (row.ranks, row.rounds) == (2, 2) for row in found)
    assert found[0].bytes_ratio == 1.0
    assert found[0].num_bytes == 1000 * 32 * 32 * 4 // 2


# Files.


def test_results_are_written_as_json_and_markdown(tmp_path):
    results = Results({"threads": "2", "processor": "one", "torch": "2"})
    results.measurements = [measurement(ours=0.2, peer=5.0, seed=15.0, limit=0.1)]
    results.verdicts = verdicts(results.measurements)
    results.tables = [update_table(results.measurements[0]), verdict_table(results.verdicts)]
    paths = write(results, tmp_path / "results")
    assert [path.name for path in paths] == ["cpu-2-threads.json", "cpu-2-threads.md"]
    assert '"polyak.WeightAverage"' in paths[0].read_text()
    assert "| polyak.WeightAverage | 0.200 |" in paths[1].read_text()


@pytest.mark.protects
def test_a_run_is_written_after_each_table(tmp_path, monkeypatch):
    """A missing package of a model, or too little memory for it, costs that model alone."""
    shapes = [
        TINY,
        replace(TINY, title="of a library", build=missing),
        replace(TINY, title="a large one", build=out_of_memory),
        replace(TINY, title="the last"),
    ]
    monkeypatch.setattr(commands, "SHAPES", shapes)
    written = []
    monkeypatch.setattr(commands.results, "write", lambda *about: written.append(write(*about)) or written[-1])
    text = io.StringIO()
    shown = commands.Shown(Console(file=text, width=150), "cpu", tmp_path)
    commands.measure_updates(shown, "float32", "small", "polyak.WeightAverage", 1)
    assert len(written) == 2
    record = json.loads(written[-1][0].read_text())
    assert [update["shape"] for update in record["updates"]] == [TINY.title, "the last"]
    assert "of a library: left out (ModuleNotFoundError: No module named 'no_such_library')" in text.getvalue()
    assert "a large one: left out (OutOfMemoryError" in text.getvalue()


def test_a_gpu_is_measured_first(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert commands.devices() == ["cuda", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert commands.devices() == ["cpu"]


@pytest.mark.protects
def test_a_record_is_written_whole_or_not_at_all(tmp_path):
    write_atomically(tmp_path / "x", "before")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "x", "a" * 100_000 + "\ud800")
    assert (tmp_path / "x").read_text() == "before"


def test_curves_are_of_those_that_were_timed_at_each_size():
    class Once:
        num_built = 0

        def __call__(self, model):
            self.num_built += 1
            return out_of_memory() if self.num_built > 1 else ours.weight_average(model)

    contenders = (WEIGHT_AVERAGE, replace(WEIGHT_AVERAGE, name="timm ModelEmaV3", build=Once()))
    suite = replace(FLOAT32, contenders=contenders)
    found = scaling.curve("x", [TINY, TINY], by_entries=True, suite=suite)
    assert list(found.milliseconds) == ["polyak.WeightAverage", "flat lerp_"]


def test_a_model_of_one_tensor():
    assert [tensor.numel() for tensor in one_tensor(7).state_dict().values()] == [7]


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="what is measured is told by Linux alone")
@pytest.mark.parametrize("write_file", [inspect_large.write_safetensors, inspect_large.write_torch])
def test_inspection_of_a_large_file_is_measured(write_file, tmp_path, monkeypatch):
    monkeypatch.setattr(inspect_large, "WIDTH", 64)
    write_file(tmp_path / "x", 1_000_000)
    name, arguments, cache, seconds, megabytes, read = inspect_large.measure(tmp_path / "x", ["--verify"], cold=False)
    assert (name, arguments, cache, read) == ("x", "--verify", "warm", "100.00%")
    assert float(seconds) > 0
    assert 10 < float(megabytes) < 200


# Averages on the host.


def test_what_two_lists_of_intervals_share():
    assert host.shared([(0, 10), (20, 30)], [(5, 22), (29, 40)]) == 5 + 2 + 1
    assert host.shared([(0, 1)], []) == 0
    assert host.length([(0, 10), (20, 35)]) == 25


def test_an_average_beside_a_training_is_measured(tmp_path):
    size = language.Size(32, 1, 2, 50, 2, 8, torch.float32, turns=2, steps=2)
    found = host.measure(size, torch.device("cpu"))
    assert (found.steps, found.parameters) == (4, 50 * 32 + 2 * 32 + 12 * 32**2 + 13 * 32)
    assert 0 < found.updates <= 4
    assert 0 <= found.overlap <= 1
    assert found.staging_bytes >= 2 * 4 * found.parameters
    paths = host.write(found, "cpu", tmp_path)
    assert json.loads(paths[0].read_text())["host"]["overlap"] == found.overlap
    assert "| times as long | " in paths[1].read_text()


def test_the_bounds_of_averages_on_the_host():
    alone, beside, in_place = (Spread(time, time - 1, time + 1) for time in (100.0, 101.0, 103.0))
    found = host.HostResult(1, alone, beside, in_place, 10, 10, 5.0, 0.9, 2, 50.0, 45.0, 44.0)
    assert (found.times_as_long, found.of_rate) == (1.01, 0.9)
    assert host.with_quartiles(beside) == "101 (100 to 102)"
    marks = [row[2] for row in host.table(found, "cuda").rows if row[2]]
    assert marks == ["<= 1.02: pass", ">= 0.85: pass"]
