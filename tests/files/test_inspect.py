"""The account of a file, against what torch computes of the same tensors."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import polyak
from library_files import CASES, FILES
from polyak.files.containers import Between, Pieced, Reader, Span, Stored, all_regions, flattened, sizes, spread_regions
from polyak.files.containers.reader import decode, raw_type
from polyak.files.containers.regions import whole
from polyak.files.containers.stored import dense_stride
from polyak.files.dtypes import DTYPES
from polyak.files.inspection import inspect, plain
from polyak.files.layouts import examine

DTYPES_OF_TORCH = {
    name: getattr(torch, name) for name, dtype in DTYPES.items() if dtype.is_inexact and hasattr(torch, name)
}


def save(path, raw, average, **others):
    torch.save({"state_dict": raw, "state_dict_ema": average, **others}, path)
    return path


def account_of(path, **options):
    return inspect(examine(path), **options)


def relative(average, raw):
    """norm(average - raw) / norm(raw) in float64, over dictionaries."""
    pairs = [(average[name], raw[name]) for name in raw if raw[name].is_floating_point() or raw[name].is_complex()]
    wide = [[torch.view_as_real(t.to(torch.complex128)) for t in pair] for pair in pairs]
    difference = sum((one - two).square().sum() for one, two in wide)
    return float((difference / sum(two.square().sum() for _, two in wide)).sqrt())


def overall(account, average="average"):
    return next(each for each in account.distances if each.module is None and each.average == average)


def weights(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"stem.weight": (8, 3, 3, 3), "stem.bias": (8,), "head.weight": (5, 8), "head.scale": ()}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", CASES)
def test_files_of_libraries(name):
    about = json.loads((FILES / name / "about.json").read_text())
    names = about.get("names") if about.get("positional") else None
    path = FILES / name / about["path"]
    checkpoint = polyak.read(path, names=names, skip_objects=True)
    account = inspect(examine(path, names=[names] if names else [], skip_objects=True), verify=True)
    assert (account.format, account.counters, account.decay) == (
        checkpoint.format,
        checkpoint.counters,
        checkpoint.decay,
    )
    sets = {copy.name: copy for copy in account.sets}
    expected = dict(checkpoint.averages)
    if checkpoint.raw_weights is not None:
        expected["raw"] = checkpoint.raw_weights
    assert sets.keys() == expected.keys()
    for key, tensors in expected.items():
        assert sets[key].num_tensors == len(tensors)
        assert sum(sets[key].dtypes.values()) == sets[key].num_distinct <= len(tensors)
        assert sets[key].where or sets[key].files
        assert sets[key].is_average == (key != "raw")
    for each in account.distances:
        average, raw = expected[each.average], expected["raw"]
        again = {key for copy in sets.values() for tie in copy.ties for key in tie[1:]}
        inside = [key for key in raw if key in average and key not in again]
        inside = [key for key in inside if each.module is None or key.startswith(f"{each.module}.")]
        measured = relative({key: average[key] for key in inside}, {key: raw[key] for key in inside})
        assert each.relative == pytest.approx(measured, rel=1e-6, abs=1e-12)
    assert bool(account.distances) == ("raw" in expected and len(expected) > 1)
    assert account.nonfinite == ()
    assert account.verification.problems == ()
    assert account.reading.is_exact
    json.dumps(plain(account), allow_nan=False)


class TestDtypes:
    @pytest.mark.parametrize("dtype", [name for name in DTYPES_OF_TORCH if name.startswith("float8")])
    def test_each_number_of_eight_bits(self, dtype):
        every = torch.arange(256, dtype=torch.uint8)
        found = decode(every.numpy(), dtype)
        torch.testing.assert_close(
            torch.from_numpy(found), every.view(DTYPES_OF_TORCH[dtype]).float(), rtol=0, atol=0, equal_nan=True
        )

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_each_number_of_sixteen_bits(self, dtype):
        every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
        found = decode(every.numpy().view(raw_type(dtype)), dtype).astype(np.float32)
        torch.testing.assert_close(
            torch.from_numpy(found), every.view(DTYPES_OF_TORCH[dtype]).float(), rtol=0, atol=0, equal_nan=True
        )

    @pytest.mark.parametrize("dtype", DTYPES_OF_TORCH)
    def test_distance(self, dtype, tmp_path):
        # Powers of two are numbers of every dtype, also of that which has nothing else.
        raw = {
            name: tensor.abs().log2().round().exp2().to(DTYPES_OF_TORCH[dtype]) for name, tensor in weights().items()
        }
        average = {name: tensor.double() * 2 for name, tensor in weights(1).items()}
        account = account_of(save(tmp_path / "x.pth", raw, average))
        expected = relative(average, {name: tensor.to(torch.complex128) for name, tensor in raw.items()})
        assert overall(account).relative == pytest.approx(expected, rel=1e-12)
        assert account.sets[1].dtypes == {dtype: 4}

    def test_integers_count_for_nothing(self, tmp_path):
        raw = {**weights(), "steps": torch.tensor(3), "mask": torch.ones(4, dtype=torch.bool)}
        average = {**raw, "steps": torch.tensor(99)}
        account = account_of(save(tmp_path / "x.pth", raw, average))
        assert overall(account).relative == 0
        assert account.sets[0].num_numbers == sum(tensor.numel() for tensor in weights().values())
        assert account.sets[0].dtypes == {"float32": 4, "int64": 1, "bool": 1}
        assert account.sets[0].num_bytes == 4 * account.sets[0].num_numbers + 8 + 4


class TestDistances:
    def test_by_module(self, tmp_path):
        raw, average = weights(), weights(1)
        account = account_of(save(tmp_path / "x.pth", raw, average))
        found = {each.module: each.relative for each in account.distances}
        for module in ("stem", "head"):
            inside = [name for name in raw if name.startswith(module)]
            expected = relative({name: average[name] for name in inside}, {name: raw[name] for name in inside})
            assert found[module] == pytest.approx(expected, rel=1e-12)
        assert found[None] == pytest.approx(relative(average, raw), rel=1e-12)
        assert list(found) == [None, "stem", "head"]

    def test_zero_and_none(self, tmp_path):
        zeros = {name: torch.zeros_like(tensor) for name, tensor in weights().items()}
        assert overall(account_of(save(tmp_path / "x.pth", zeros, zeros))).relative == 0
        account = account_of(save(tmp_path / "x.pth", zeros, weights()))
        assert overall(account).relative == math.inf
        assert plain(account)["distances"][0]["relative"] is None
        alone = tmp_path / "alone.safetensors"
        save_file(weights(), alone)
        assert account_of(alone).distances == ()

    def test_what_has_another_shape_is_named(self, tmp_path):
        raw, average = weights(), weights(1)
        raw["head.weight"] = torch.ones(5, 9)
        account = account_of(save(tmp_path / "x.pth", raw, average))
        assert account.notes[-1] == "of another shape in the raw weights, and not compared: 'head.weight'"
        same = [name for name in raw if name != "head.weight"]
        expected = relative({name: average[name] for name in same}, {name: raw[name] for name in same})
        assert overall(account).relative == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("budget", [1 << 26, 400])
    def test_numbers_in_another_order(self, tmp_path, budget):
        raw, average = weights(), weights(1)
        average["stem.weight"] = average["stem.weight"].contiguous(memory_format=torch.channels_last)
        average["head.weight"] = average["head.weight"].t().contiguous().t()
        raw["stem.bias"] = torch.arange(24.0)[::3]
        raw["head.scale"] = torch.ones(1).expand(8)[3]
        path = save(tmp_path / "x.pth", raw, average)
        expected = relative(average, raw)
        assert overall(account_of(path)).relative == pytest.approx(expected, rel=1e-12)
        sampled = account_of(path, budget=budget)
        assert sampled.reading.is_exact == (budget > 400)

    def test_of_large_tensors(self, tmp_path):
        generator = torch.Generator().manual_seed(0)
        raw = {"a.w": torch.randn(1500, 1001, generator=generator), "a.v": torch.randn(700_001, generator=generator)}
        average = {"a.w": (raw["a.w"] * 1.5).t().contiguous().t(), "a.v": raw["a.v"] + 1}
        account = account_of(save(tmp_path / "x.pth", raw, average))
        assert overall(account).relative == pytest.approx(relative(average, raw), rel=1e-12)


class TestReading:
    @pytest.mark.protects
    def test_a_part_stands_for_the_whole(self, tmp_path):
        generator = torch.Generator().manual_seed(0)
        raw = {f"{part}.w": torch.randn(300_000, generator=generator) for part in "ab"}
        average = {"a.w": raw["a.w"] * 1.5, "b.w": raw["b.w"] + 0.1 * torch.randn(300_000, generator=generator)}
        # Of this one everything is read, and it must not count for more.
        raw["small.w"] = torch.randn(3000, generator=generator)
        average["small.w"] = 5 * raw["small.w"]
        path = save(tmp_path / "x.pth", raw, average)
        account = account_of(path, budget=1 << 18)
        assert 0.02 < account.reading.num_read / account.reading.num_numbers < 0.06
        found = {each.module: each for each in account.distances}
        assert found["a"].relative == pytest.approx(0.5, rel=1e-6)
        assert found["b"].relative == pytest.approx(0.1, rel=0.05)
        assert found["a"].num_read < found["a"].num_numbers == 300_000
        assert found[None].relative == pytest.approx(relative(average, raw), rel=0.05)

    def test_small_tensors_are_read_whole(self, tmp_path):
        raw = {"large": torch.randn(1_000_000), "small": torch.randn(10)}
        raw["small"][-1] = math.nan
        account = account_of(save(tmp_path / "x.pth", raw, raw), budget=1 << 16)
        assert [(each.name, each.weights) for each in account.nonfinite] == [("small", "average"), ("small", "raw")]

    def test_all_is_read_to_verify(self, tmp_path):
        raw = {"a.w": torch.randn(500_000)}
        raw["a.w"][123_456] = math.inf
        path = save(tmp_path / "x.pth", raw, weights())
        assert account_of(path, budget=1 << 12).nonfinite == ()
        done = []
        account = account_of(path, budget=1 << 12, verify=True, progress=lambda *each: done.append(each))
        assert account.nonfinite[0].num_infinite == 1
        assert done[-1][0] == done[-1][1]
        assert [each[0] for each in done] == sorted(each[0] for each in done)

    @pytest.mark.parametrize("shape", [(1000,), (10, 100), (7, 11, 13), (1, 1000, 1)])
    @pytest.mark.parametrize("is_flat", [True, False])
    def test_regions_are_disjoint_and_whole(self, shape, is_flat):
        stride = dense_stride(shape) if is_flat else tuple(2 * step for step in dense_stride(shape))
        leaf = Stored("float32", shape, stride, 0, Span(Path("x"), 0, 8 * math.prod(shape)))
        given = flattened([leaf])
        assert (given[0] == leaf) == (not is_flat or len(shape) == 1)
        counts = np.zeros(given[0].shape, int)
        for region in all_regions(given, 50):
            counts[tuple(slice(*ends) for ends in region)] += 1
            assert math.prod(sizes(region)) <= 50
        assert (counts == 1).all()
        spread = list(spread_regions(given, 50, 8))
        assert len(set(spread)) == len(spread) == 8

    def test_pieces_and_what_lies_between(self, tmp_path):
        numbers = np.arange(24, dtype="<f4")
        numbers.tofile(tmp_path / "x")
        top, bottom = (Stored("float32", (2, 4), (4, 1), start, Span(tmp_path / "x", 0, 96)) for start in (0, 8))
        pieced = Pieced("float32", (4, 4), (((2, 0), bottom), ((0, 0), top)))
        with Reader() as reader:
            assert reader.array(pieced, whole((4, 4))).tolist() == numbers[:16].reshape(4, 4).tolist()
            assert reader.array(pieced, ((1, 3), (1, 2))).tolist() == [[5.0], [9.0]]
            between = Between(top, bottom, 0.25)
            assert reader.array(between, ((0, 1), (0, 4))).tolist() == [[2.0, 3.0, 4.0, 5.0]]
            assert reader.array(flattened([between])[0], ((1, 3),)).tolist() == [3.0, 4.0]
        assert len(list(all_regions([pieced], 4))) == 4

    def test_a_file_that_has_become_shorter(self, tmp_path):
        path = tmp_path / "x.safetensors"
        save_file(weights(), path)
        found = examine(path)
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(polyak.FileFormatError, match=r"x.safetensors' has become shorter since it was opened"):
            inspect(found)


class TestNonFinite:
    def test_counts(self, tmp_path):
        raw, average = weights(), weights(1)
        raw["stem.weight"][0] = math.nan
        raw["stem.bias"][:2] = torch.tensor([math.inf, -math.inf])
        average["head.weight"] = average["head.weight"].to(torch.complex64)
        average["head.weight"][0, 0] = complex(0, math.inf)
        account = account_of(save(tmp_path / "x.pth", raw, average))
        found = {(each.weights, each.name): (each.num_nan, each.num_infinite) for each in account.nonfinite}
        assert found == {
            ("raw", "stem.weight"): (27, 0),
            ("raw", "stem.bias"): (0, 2),
            ("average", "head.weight"): (0, 1),
        }
        assert math.isnan(overall(account).relative)
        assert plain(account)["distances"][0]["relative"] is None


class TestContents:
    def test_ties(self, tmp_path):
        model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
        model["c"].weight = model["a"].weight
        model.register_buffer("empty", torch.zeros(0))
        model.register_buffer("nothing", torch.zeros(0))
        account = account_of(save(tmp_path / "x.pth", model.state_dict(), model.state_dict()))
        for copy in account.sets:
            assert copy.ties == (("a.weight", "c.weight"),)
            assert (copy.num_tensors, copy.num_numbers) == (8, 2 * 16 + 3 * 4)

    def test_where_and_what_else(self, tmp_path):
        state = {0: {"exp_avg": torch.ones(3, 4)}, 1: {"exp_avg": torch.ones(2)}}
        others = {
            "optimizer": {"state": state, "groups": [1]},
            "args": {"lr": 0.1},
            "arch": "vit",
            "epoch": 4,
            "rng": None,
        }
        account = account_of(save(tmp_path / "x.pth", weights(), weights(1), **others))
        assert [copy.where for copy in account.sets] == [("state_dict_ema/*",), ("state_dict/*",)]
        assert account.counters == {"epoch": 4}
        found = {each.name: (each.kind, each.num_tensors, each.num_bytes) for each in account.others}
        assert found == {
            "optimizer": ("dict of 2", 2, 56),
            "args": ("dict of 1", 0, 0),
            "arch": ("text", 0, 0),
            "rng": ("None", 0, 0),
        }

    def test_names_with_a_prefix(self, tmp_path):
        tensors = {
            f"{prefix}.{name}": t.clone() for prefix in ("ema_model", "online_model") for name, t in weights().items()
        }
        save_file({**tensors, "other.x": torch.ones(2), "initted": torch.tensor(True)}, tmp_path / "x.safetensors")
        account = account_of(tmp_path / "x.safetensors")
        assert [copy.where for copy in account.sets] == [("ema_model.*",), ("online_model.*",)]
        assert [(each.name, each.num_bytes) for each in account.others] == [("other.*", 8), ("initted", 1)]

    def test_how_it_was_made(self, tmp_path):
        average = polyak.WeightAverage(nn.Linear(2, 2), {"a": polyak.Exponential(half_life=20), "b": polyak.Uniform()})
        average.update(at=10)
        torch.save(average.state_dict(), tmp_path / "x.pt")
        found = {each.average: each for each in account_of(tmp_path / "x.pt").profiles}
        assert found["a"].profile == repr(polyak.Exponential(half_life=20))
        assert found["a"].half_life == polyak.Exponential(half_life=20).half_life(10)
        assert found["b"].mean_age == 5
        other = account_of(save(tmp_path / "ema_0.5_000003.pt", weights(), weights()))
        assert (other.decay, other.half_life) == (None, None)
        torch.save({"shadow_params": [torch.ones(2)], "num_updates": 3, "decay": 0.5}, tmp_path / "y.pt")
        other = account_of(tmp_path / "y.pt")
        assert (other.decay, other.half_life, other.mean_age) == (0.5, pytest.approx(1), pytest.approx(1))
