"""What is said about averages of large models: formulas are what small models take, and the page has what they give."""

import dataclasses
import json

import pytest
import torch
from torch import distributed, nn

import polyak
from benchmarks import host, pages, rates, sizing
from benchmarks.suites import COMPENSATED, FLOAT32, MIXED, SUITES
from benchmarks.timing import Spread


@pytest.mark.parametrize("suite", sizing.MODES, ids=lambda suite: suite.name)
def test_bytes_a_parameter_are_those_of_a_small_model(suite):
    model = nn.Linear(64, 32).to(suite.source)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    stochastic = suite.average != torch.float32
    average = polyak.WeightAverage(model, dtype=suite.average if stochastic else None, compensated=suite is COMPENSATED)
    assert average.report().num_bytes == sizing.kept_bytes(suite) * num_parameters
    moved = sum(
        row.source.nbytes + 2 * sum(tensor.nbytes for tensor in row.tensors[1:])
        for row in average._core.store.updates.plan.rows
    )
    assert moved == suite.bytes_per_parameter * num_parameters


@pytest.fixture
def ranks():
    """Starts a process group whose other ranks do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    yield lambda size: distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="needs torch.distributed")
class TestLayouts:
    """A rank averages the share that the layouts say."""

    def share(self, model, num_parameters):
        (element,) = {sizing.kept_bytes(suite) for suite in (FLOAT32, MIXED)}
        return num_parameters * element / polyak.WeightAverage(model).report().num_bytes

    @pytest.mark.parametrize(("size", "shape", "here"), [(8, (8,), 8), (64, (64,), 64), (64, (8, 8), 8)])
    def test_fsdp2_and_hsdp(self, ranks, size, shape, here):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        ranks(size)
        model = nn.Linear(64, 64)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
        assert self.share(fully_shard(model, mesh=mesh), 64 * 65) == here

    def test_experts(self, ranks):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import Shard, distribute_tensor

        ranks(2048)
        mesh = init_device_mesh("cpu", (32, 64), mesh_dim_names=("shards", "experts"))
        model = nn.Linear(64, 256, bias=False)
        weight = distribute_tensor(model.weight.detach(), mesh["experts"], [Shard(0)])
        model.weight = nn.Parameter(weight)
        fully_shard(model, mesh=mesh["shards"], shard_placement_fn=lambda parameter: Shard(1))
        assert self.share(model, 64 * 256) == 2048


def test_what_a_place_takes():
    layout = sizing.Layout("", "", here=1000.0, replicas=4, suite=MIXED)
    on_gpu, divided, on_host = sizing.places(layout)
    assert (on_gpu.gpu_bytes, on_gpu.gpu_traffic, on_gpu.host_bytes, on_gpu.pcie_traffic) == (4000, 10_000, 0, 0)
    assert (divided.gpu_bytes, divided.gpu_traffic) == (1000, 2500)
    assert (on_host.gpu_bytes, on_host.pcie_traffic) == (0, 500)
    assert (on_host.host_bytes, on_host.host_traffic) == (8 * 250 * (4 + 2 * 2), 8 * 2500)


def test_a_layout_without_replicas_has_nothing_to_share():
    layout = sizing.Layout("", "", here=1000.0, replicas=1, suite=FLOAT32)
    assert [place.name for place in sizing.places(layout)] == ["GPU", "host"]


def test_all_ranks_together_have_the_model():
    *_, whole, staged = sizing.LAYOUTS
    assert whole.here * 2048 == pytest.approx(671e9)
    assert round(sizing.EXPERTS / 1e9) == 654
    assert staged.here * 2048 == pytest.approx(2 * sizing.EXPERTS + 128 * sizing.REST)


def record(machine, **others):
    return {"machine": {"processor": "one", "cores": "2", **machine}, **others}


def timed(suite, parameters, milliseconds, device="cpu"):
    name = suite.contenders[0].name
    times = {name: {"median": milliseconds}}
    return {"averages": suite.title, "parameters": parameters, "device": device, "milliseconds": times}


def test_rates_are_found_by_name_and_those_of_a_machine_together(tmp_path):
    found = {
        "cpu": record({}, updates=[timed(MIXED, 1000, 1.0), timed(MIXED, 10, 0.001)]),
        "cuda": record({"gpu": "large"}, updates=[timed(FLOAT32, 1000, 0.5, "cuda")]),
        "host": record({}, rows=[{"pcie_bytes_per_second": 5e6}]),
        "other": record({"cores": "64"}, updates=[]),
    }
    for name, each in found.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(each))
    one, other = rates.machines(tmp_path)
    assert one.name == "large, one, 2 cores"
    assert one.rates == pytest.approx(
        {rates.update_rate("cpu", MIXED): 1e7, rates.update_rate("cuda", FLOAT32): 2.4e7, rates.PCIE: 5e6}
    )
    assert other.rates == {}


def test_the_rate_of_copies_is_the_one_beside_a_training(tmp_path):
    time = Spread(1.0, 1.0, 1.0)
    found = host.HostResult(1, time, time, time, 10, 10, 5.0, 0.9, 2, 4.0, idle_rate=3.0, training_rate=2.0)
    idle = dataclasses.replace(found, training_rate=None)
    nowhere = dataclasses.replace(idle, idle_rate=None)
    for each, expected in [(found, {rates.PCIE: 2 * 2**30}), (idle, {rates.PCIE: 3 * 2**30}), (nowhere, {})]:
        path, _ = host.write(each, "cpu", tmp_path)
        assert rates.rates_of(json.loads(path.read_text())) == expected


def test_what_was_not_measured_is_left_out():
    machine = rates.Machine("it", {rates.update_rate("cpu", MIXED): 8e7, rates.update_rate("cpu", FLOAT32): 8e7})
    table = sizing.time_table(machine)
    assert table.columns == ("model", "layout", "averages on", "CPU")
    assert len(table.rows) == len(sizing.LAYOUTS)
    assert all(place.startswith("host") and time for _, _, place, time in table.rows)


def test_a_rate_that_was_not_measured_gives_no_time():
    layout = sizing.Layout("", "", here=1000.0, replicas=1, suite=MIXED)
    on_gpu, on_host = sizing.places(layout)
    machine = rates.Machine("it", {rates.update_rate("cpu", MIXED): 8e7})
    assert [sizing.by_every(each) for each in on_gpu.seconds(machine)] == ["", "", ""]
    assert [sizing.by_every(each) for each in on_host.seconds(machine)] == ["", "", "1.00 · 0.100 · 0.0100"]


def test_each_mode_is_a_suite_that_is_timed():
    for suite in sizing.MODES:
        assert suite in SUITES


def test_the_page_has_what_the_script_gives():
    written = pages.made_text(sizing.PAGE, sizing.MARK)
    assert written == sizing.text(rates.machines()), "python -m benchmarks.sizing --write writes it anew"
