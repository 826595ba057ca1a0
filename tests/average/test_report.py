"""What an average says of itself."""

import pytest
import torch
from torch import nn

import polyak
import zoo

pytestmark = pytest.mark.filterwarnings("ignore:the average is .* after 0 updates")


def test_numbers():
    model = zoo.batchnorm()
    average = polyak.WeightAverage(model, {"ema": polyak.Exponential(0.9), "mean": polyak.Uniform()}, every=2)
    for _ in range(9):
        zoo.drift(model)
        average.update()
    report = average.report()
    ema, mean = report.averages
    assert (report.num_calls, report.num_updates, report.num_skipped, report.time) == (9, 4, 0, 9)
    assert ema.decay == pytest.approx(0.9)
    assert ema.initial_weight == pytest.approx(0.9**8)
    assert ema.mean_age == pytest.approx(9 * (1 - 0.9**8))
    assert (mean.mean_age, mean.initial_weight) == (4, 0)
    assert report.num_bytes == 2 * 4 * (4 * 2 * 9 + 4 + 4 + 4 + 4 + 4 + 3 * 16 + 3) + 8
    weights = average["mean"].weights()
    names = [entry.name for entry in report.entries if entry.action == "average"]
    state = model.state_dict()
    apart = sum((weights[name] - state[name]).double().square().sum() for name in names)
    size = sum(state[name].double().square().sum() for name in names)
    assert mean.distance == pytest.approx(float((apart / size).sqrt()))
    assert list(mean.distances) == ["0", "1", "4"]
    assert min(mean.distances.values()) <= mean.distance <= max(mean.distances.values())


def test_text_shows_what_is_done_to_what():
    model = zoo.TiedTransformer()
    model.layer.linear1.requires_grad_(False)
    text = str(polyak.WeightAverage(model).report())
    assert "embedding.weight = head.weight" in text
    assert "skip     frozen" in text
    assert "Power(relative_std=0.1)" in text


@pytest.mark.protects
def test_what_never_moved_although_the_model_did_is_named():
    model = zoo.mlp()
    average = polyak.WeightAverage(model, polyak.Exponential(0.5))
    zoo.drift(model)
    average.update()
    assert average.report().stuck == ()
    frozen = polyak.WeightAverage(model, polyak.Exponential(1.0))
    with torch.no_grad():
        model[0].weight.add_(1)
    frozen.update()
    assert frozen.report().stuck == ("0.weight",)
    assert "never moved, although the model did: '0.weight'" in str(frozen.report())


@pytest.mark.protects
def test_a_model_that_is_not_trained_is_noticed():
    model = zoo.mlp()
    average = polyak.WeightAverage(model)
    average.update()
    assert "the model has not changed since the average was made" in str(average.report())
    zoo.drift(model)
    assert average.report().source_moved


@pytest.mark.protects
def test_an_average_longer_than_the_run_warns():
    average = polyak.WeightAverage(zoo.mlp(), {"long": polyak.Exponential(0.9999), "power": polyak.Power()})
    message = r"average 'long', Exponential\(decay=0.9999\), is longer than the run of 580: 94 % of it will still be"
    with pytest.warns(UserWarning, match=message):
        average.report(total=580)
    average.report(total=100_000)
    late = polyak.WeightAverage(zoo.mlp(), polyak.Exponential(half_life=300), start=900)
    with pytest.warns(UserWarning, match=r"79 % of it will still be"):
        late.report(total=1000)
    with pytest.raises(ValueError, match=r"total=-1: the length of the run is a finite time above 0"):
        late.report(total=-1)


@pytest.mark.protects
def test_saving_or_swapping_before_the_first_update_warns_once(tmp_path):
    for use in ("state_dict", "swap_in", "export"):
        average = polyak.WeightAverage(nn.Linear(2, 2))
        call = {"state_dict": average.state_dict, "swap_in": average.swap_in}.get(
            use, lambda average=average: average.export(tmp_path / "x.safetensors")
        )
        with pytest.warns(UserWarning, match=r"after 0 updates: .* attach\(optimizer\)") as caught:
            call()
        assert caught[0].filename == __file__
        average.swap_out()
        average.state_dict()
