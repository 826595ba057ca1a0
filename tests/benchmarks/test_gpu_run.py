"""The run on a GPU that is at hand for minutes: what its parts do to each other, tried with real processes on a CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_run, pages, rates, records
from benchmarks.bounds import GPU_BOUNDS
from benchmarks.gpu import parts, sentence
from benchmarks.gpu.parts import Part
from benchmarks.gpu.record import FAILED, NOT_STARTED, PASSED, TIMED_OUT, Record
from benchmarks.gpu.updates import divided
from benchmarks.shapes import SHAPES
from benchmarks.suites import FLOAT32, PROFILES, SUITES
from has_gpu import CAN_RUN

ROOT = Path(__file__).parents[2]
SAY = "from benchmarks.gpu.emit import emit; import os, signal, subprocess, sys, time\n"


def table_of(name):
    return {"title": f"of {name}", "columns": ["", "ms"], "rows": [[name, "1.5"]], "num_text": 1, "note": ""}


def part(name, *codes, seconds=60.0, least=0.0):
    """A part whose processes say a table each, and then do as they are told."""
    commands = {
        f"{name}{number or ''}": ["-c", f"{SAY}emit(table={table_of(name + str(number or ''))})\n{code}"]
        for number, code in enumerate(codes)
    }
    return Part(name, seconds, least, lambda device, seconds: commands)


def run(chosen, folder, *, device="cpu", seconds=120.0):
    record = Record(device)
    gpu_run.run(chosen, record, folder, seconds=seconds)
    (written,) = folder.glob("*.json")
    return json.loads(written.read_text()), written.with_suffix(".md").read_text()


HANG = "time.sleep(600)"
# It takes no notice of an interruption, and has begun a process that would hang as long.
HANG_FAST = f"""
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
emit(note=str(child.pid))
{HANG}
"""


@pytest.mark.protects
def test_a_part_that_fails_hangs_or_dies_costs_its_box_and_what_was_found_is_kept(tmp_path):
    chosen = [
        part("fails", "raise ValueError('of the part')"),
        part("hangs", HANG_FAST, seconds=4.0),
        part("exits", "os._exit(3)"),
        part("dies", "os.kill(os.getpid(), signal.SIGKILL)"),
        part("half", "pass", HANG, seconds=4.0),
        part("passes", "pass"),
    ]
    started = time.monotonic()
    record, text = run(chosen, tmp_path)
    assert time.monotonic() - started < 60
    outcomes = {each["name"]: (each["outcome"], list(each["exit_codes"].values())) for each in record["parts"]}
    assert outcomes == {
        "fails": (FAILED, [1]),
        "hangs": (TIMED_OUT, [None]),
        "exits": (FAILED, [3]),
        "dies": (FAILED, [-signal.SIGKILL]),
        "half": (TIMED_OUT, [0, None]),
        "passes": (PASSED, [0]),
    }
    for name in [*outcomes, "half1"]:
        assert f"### of {name}\n" in text
        assert f"| {name} | 1.5 |" in text
    assert "fails: ValueError: of the part\n" in (tmp_path / "fails.log").read_text()
    assert "| fails | fails: ValueError: of the part |" in text
    assert "| exits | exits: printed nothing |" in text
    child = int(record["parts"][1]["notes"][0])
    assert not is_running(child)


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_what_there_is_no_time_for_is_not_begun(tmp_path):
    record, text = run([part("long", "pass", least=50.0)], tmp_path, seconds=20.0)
    assert record["parts"][0]["outcome"] == NOT_STARTED
    assert "20 s were left, and it needs 50" in text
    assert not (tmp_path / "long.log").exists()


def test_what_is_not_installed_is_named(tmp_path):
    Record("cpu", parts.missing(["torch", "no_such_library"])).write(tmp_path)
    assert "- not installed: no_such_library\n" in (tmp_path / "gpu-run-on-cpu.md").read_text()


@pytest.mark.protects
def test_the_record_is_written_after_each_part(tmp_path):
    seen = part("second", f"print(open(r'{tmp_path / 'gpu-run-on-cpu.md'}').read())")
    run([part("first", "pass"), seen], tmp_path)
    assert "second: ### of first\n" in (tmp_path / "second.log").read_text()


def test_the_record_gets_the_name_of_the_gpu_when_it_is_known(tmp_path):
    about = "emit(machine={'gpu': 'NVIDIA H100 80GB HBM3'})"
    record, text = run([part("first", "pass"), part("second", about)], tmp_path, device="cuda")
    assert record["machine"] == {"gpu": "NVIDIA H100 80GB HBM3"}
    assert "- gpu: NVIDIA H100 80GB HBM3\n" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "first.log",
        "gpu-nvidia-h100-80gb-hbm3.json",
        "gpu-nvidia-h100-80gb-hbm3.md",
        "second.log",
    ]


@pytest.mark.protects
def test_nothing_outlives_a_run_that_is_ended(tmp_path):
    code = f"""
import sys; sys.path[:0] = [{str(ROOT / "tests" / "support")!r}, {str(Path(__file__).parent)!r}]
from pathlib import Path
import signal, test_gpu_run
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
test_gpu_run.run([test_gpu_run.part("hangs", test_gpu_run.HANG_FAST)], Path({str(tmp_path)!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    log = tmp_path / "hangs.log"
    while not (log.exists() and "note" in log.read_text()):
        time.sleep(0.1)
        assert process.poll() is None
    process.terminate()
    assert process.wait(60) == 1
    (written,) = tmp_path.glob("*.json")
    (found,) = json.loads(written.read_text())["parts"]
    assert found["outcome"] == "interrupted"
    assert not is_running(int(found["notes"][0]))


# The parts themselves.

TESTS_OF_ALL_KINDS = """
import os, time, pytest

@pytest.mark.parametrize("x", ["a b", "c"])
def test_passes(x): pass
def test_fails(): assert 1 + 1 == 3
@pytest.mark.skip(reason="no [100%] reason")
def test_skips(): pass
def test_prints_beside():
    os.write(2, b"something\\n")
"""


@pytest.mark.parametrize("end", ["", "def test_dies(): os.abort()", "def test_hangs(): time.sleep(600)"])
def test_results_of_tests_are_those_that_the_plugin_reports(end, tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(TESTS_OF_ALL_KINDS + end)
    arguments = [*parts.pytest("tests/test_it.py")[2:], "-s", "-c", os.devnull, "--rootdir", str(tmp_path)]
    code = f"import os, pytest; os.chdir({str(tmp_path)!r}); raise SystemExit(pytest.main({arguments}))"
    it = Part("tests", 12.0, 0.0, lambda device, seconds: {"test_it": ["-c", code]})
    record, text = run([it], tmp_path / "out")
    assert record["parts"][0]["outcome"] == (TIMED_OUT if "hangs" in end else FAILED)
    under_way = end.removeprefix("def ").partition("(")[0]
    under_way = f"tests/test_it.py::{under_way}" if under_way else ""
    expected = {"passed": 3, "skipped": 1, "failed": ["tests/test_it.py::test_fails"], "under_way": under_way}
    assert record["tests"] == {"test_it": expected}
    assert f"| test_it | {under_way} | 3 | 1 | 1 |" in text
    assert "FAILED tests/test_it.py::test_fails - assert (1 + 1) == 3" in text or "dies" in end


def test_on_a_gpu_a_file_without_a_test_that_passed_has_failed(tmp_path):
    record = Record("cuda")
    commands = {"test_gpu": ["-c", SAY + "emit(test='test_x', event='skipped')"]}
    gpu_run.run([Part("tests", 60.0, 0.0, lambda *_: commands)], record, tmp_path, seconds=60.0)
    assert record.parts[0].outcome == FAILED
    assert record.parts[0].failures == ["no test in test_gpu has passed"]


@pytest.mark.parametrize("names", [parts.UPDATES, parts.OTHERS], ids=["updates", "others"])
def test_what_is_timed_exists(names):
    suites, shapes = ({each.name: each for each in rows} for rows in (SUITES, SHAPES))
    for device, chosen in names.items():
        for suite, shape in (name.split(":") for name in chosen):
            assert shape in suites[suite].shapes
            assert device == "cuda" or not shapes[shape].on_gpu_only


def test_on_the_largest_models_the_fastest_are_timed_and_the_others_named():
    shapes = {shape.name: shape for shape in SHAPES}
    timed, too_slow = divided(FLOAT32, shapes["llama-1b"], torch.device("cuda"))
    assert {"polyak.WeightAverage", "copy of as many bytes", "timm ModelEmaV3"} <= {each.name for each in timed}
    assert {"the seed's formula", "Lightning EMAWeightAveraging"} <= {each.name for each in too_slow}
    assert divided(FLOAT32, shapes["small"], torch.device("cuda"))[1] == []
    assert divided(PROFILES, shapes["llama-1b"], torch.device("cuda"))[1] == []


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """A real run, on the CPU, from a checkout."""
    folder = tmp_path_factory.mktemp("run")
    command = [sys.executable, "benchmarks/gpu_run.py", str(folder), "--only", "smoke,tests,others", "--device", "cpu"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True), folder


def test_a_run_on_a_cpu_ends_with_tables(tried):
    process, folder = tried
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.endswith((folder / "gpu-run-on-cpu.md").read_text().partition("### ")[2])
    files = sorted(folder.rglob("*"))
    assert [file.name for file in files] == [
        *("gpu-run-on-cpu.json", "gpu-run-on-cpu.md", "others.log", "smoke.log", "tests.log"),
    ]


def test_its_record_is_one_of_a_machine_with_rates(tried):
    (machine,) = rates.machines(tried[1])
    assert "cpu: float32, compensated" in machine.rates


# What the README says.


def test_a_record_of_a_cpu_says_nothing_of_gpus(tried):
    assert sentence.sentence(records.records(tried[1])) == sentence.NOT_YET


@pytest.mark.skipif(CAN_RUN, reason="the tests for GPUs are not skipped on a GPU")
def test_the_latest_record_of_a_gpu_is_told(tried):
    (record,) = records.records(tried[1]).values()
    verdict = {"suite": "float32", "shape": "1000 tensors of 32x32", "what": "times as fast as timm ModelEmaV3"}
    record["verdicts"].append({**verdict, "value": 43.21, "bound": ">= 20", "reached": True, "beside": ""})
    record["tests"]["test_gpu"]["passed"] += 5
    record["tests"]["test_gpu"]["failed"].append("test_x")
    about = {**record["machine"], "gpu": "NVIDIA H100", "torch": "2.11.0", "date": "2030-01-02"}
    earlier = {**record, "machine": {**about, "gpu": "NVIDIA H200", "date": "2030-01-01"}}
    beside = {"machine": {**about, "date": "2030-01-03"}, "host": {}}
    text = sentence.sentence({"gpu-a": earlier, "gpu-b": {**record, "machine": about}, "host-cuda": beside})
    num_skipped = sum(file["skipped"] for file in record["tests"].values())
    assert num_skipped > 60
    assert text == (
        f"On one NVIDIA H100, with torch 2.11.0, 2030-01-02: 5 of {num_skipped + 6} GPU tests passed; an update "
        "of 1000 small tensors is 43.2 times as fast as timm's ModelEmaV3 ([record](benchmarks/results/gpu-b.md))."
    )


def test_what_is_told_of_a_record_is_a_bound_for_gpus():
    titles = {shape.name: shape.title for shape in SHAPES}
    bounds = {(bound.suite.name, titles[shape], bound.what) for bound in GPU_BOUNDS for shape in bound.shapes}
    assert sentence.QUOTED.keys() <= bounds


def test_the_readme_says_what_the_records_say():
    written = pages.made_text(pages.README, sentence.MARK)
    expected = sentence.wrapped(sentence.sentence(records.records()))
    assert written == expected, "python -m benchmarks.gpu.sentence --write writes it anew"
