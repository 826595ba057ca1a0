"""The examples run, and show what they say."""

import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, nn

import polyak
import zoo

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small gain nothing from several threads, and lose much where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def load(name):
    """An example as a module; once, for a name of a schedule is registered once."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_target_network_learns_what_each_step_is_worth(capsys):
    example = load("target_network")
    found = example.main()
    assert found["states where it goes right"] == example.NUM_STATES - 1
    assert found["largest error"] < 0.05
    assert found["largest error of the target"] < 0.1
    assert "right is worth" in capsys.readouterr().out


def test_true_values_of_the_chain_satisfy_their_equation():
    example = load("target_network")
    values = example.true_values()
    for state in range(example.NUM_STATES - 1):
        for action in (example.LEFT, example.RIGHT):
            following, reward, ends = example.step_chain(torch.tensor(state), torch.tensor(action))
            worth = reward if ends else reward + example.DISCOUNT * values[following].max()
            assert torch.isclose(values[state, action], torch.as_tensor(worth)), (state, action)


def test_mean_teacher_learns_from_points_without_labels(capsys):
    errors = load("mean_teacher").main()
    assert errors["teacher"] < 0.6 * errors["labels alone"]
    assert errors["student"] < 0.6 * errors["labels alone"]
    assert "% wrong" in capsys.readouterr().out


# rho = 10, gamma = 1, kappa = 0.5, eta = 0.2, as published.
BEMA = {
    0: (0.316228, 0.630957),
    100: (0.095346, 0.390590),
    400: (0.049386, 0.300222),
    1000: (0.031466, 0.250689),
    10000: (0.009995, 0.158458),
}


@pytest.mark.parametrize("t", BEMA)
def test_bema_has_the_published_values(t):
    example = load("bema")
    beta, alpha = BEMA[t]
    assert abs(example.bema_beta(t) - beta) < 1e-6
    assert abs(example.bema_alpha(t) - alpha) < 1e-6
    assert example.bema_beta(t, floor=0.05) == max(example.bema_beta(t), 0.05)


@pytest.mark.parametrize(("every", "burn_in"), [(1, 0), (4, 0), (4, 8), (1, 5)])
def test_bema_follows_its_recursion(every, burn_in):
    torch.manual_seed(0)
    example = load("bema")
    model = nn.Linear(3, 2).double()
    bema = example.Bema(model, every=every, burn_in=burn_in, kappa=0.4, eta=0.3, rho=5.0, gamma=0.5, floor=0.2)
    theta = initial = average = model.weight.detach().clone()
    for t in range(1, 41):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        bema.update()
        if t % every:
            continue
        theta = model.weight.detach().clone()
        if t <= burn_in:
            initial = average = theta
        else:
            beta = max((5 + 0.5 * t) ** -0.4, 0.2)
            average = (1 - beta) * average + beta * theta
        expected = average + (5 + 0.5 * t) ** -0.3 * (theta - initial)
        assert torch.allclose(bema.weights()["weight"], expected, rtol=1e-13, atol=1e-13), t


def test_bema_is_resumed_with_its_averages():
    example = load("bema")
    model = nn.Linear(3, 2)
    bema, other = example.Bema(model, every=1), example.Bema(model, every=1)
    for _ in range(3):
        with torch.no_grad():
            model.weight.add_(1.0)
        bema.update()
    other.average.load_state_dict(bema.average.state_dict())
    other.t = bema.t
    assert torch.equal(other.weights()["weight"], bema.weights()["weight"])
    with pytest.raises(ValueError, match="burn_in=3 must be a multiple of every=2"):
        example.Bema(model, every=2, burn_in=3)
    with pytest.raises(polyak.StateError):
        polyak.WeightAverage(model).load_state_dict(bema.average.state_dict())


def test_bema_leads_while_the_average_lags(capsys):
    losses = load("bema").main()
    for step in (50, 100, 200):
        assert losses[step]["bema"] < losses[step]["average"]
    assert losses[200]["bema"] < losses[200]["raw"]
    assert losses[400]["average"] < 1.1 * losses[400]["bema"] < losses[400]["raw"]
    assert "average  bema" in capsys.readouterr().out


def torchrun(example, *options, num_ranks):
    """Runs an example on ranks of its own, on CPUs; returns what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    command += [str(EXAMPLES / f"{example}.py"), *map(str, options)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not distributed.is_available(), reason="needs torch.distributed")
def test_a_sharded_pretraining_is_resumed_on_another_number_of_ranks(tmp_path):
    path = tmp_path / "power.safetensors"
    options = ["--output", tmp_path, "--save-every", 2]
    printed = torchrun("fsdp2_pretrain", *options, "--steps", 4, "--shard-over", 2, num_ranks=2)
    (num_parameters, num_bytes) = re.findall(r"([\d,]+) parameters, .* ([\d,]+) bytes", printed)[0]
    # Two averages in float32, of which each of the two ranks has half.
    assert int(num_bytes.replace(",", "")) == 2 * 4 * int(num_parameters.replace(",", "")) / 2
    (digest,) = re.findall(r"step-4 .* averages (\w{16})$", printed, re.MULTILINE)
    (loss,) = re.findall(r"step-4 .* power ([\d.]+) ", printed)

    # The file is what the checkpoint has, bit for bit, and what was tested.
    exported = load_file(path)
    saved = polyak.read(tmp_path / "step-4")
    assert zoo.bit_equal({name: exported[name] for name in saved.averages["power"]}, saved.averages["power"])
    example = load("fsdp2_pretrain")
    model = example.Decoder()
    model.load_state_dict(exported, strict=True)
    model.head.weight = model.embedding.weight
    assert abs(loss_of(example, model) - float(loss)) < 1e-3

    printed = torchrun("fsdp2_pretrain", *options, "--steps", 6, "--resume", num_ranks=1)
    assert f"resumed step-4 on 1 ranks, averages {digest}" in printed
    assert re.findall(r"step-(\d+) .* averages", printed) == ["4", "6"]
    assert polyak.read(path).counters["num_updates"] == 6
    assert not zoo.bit_equal(load_file(path), exported)


@torch.no_grad()
def loss_of(example, model):
    _, tokens = example.load_text()
    starts = torch.linspace(0, len(tokens) - example.LENGTH - 1, 8 * example.BATCH_SIZE).long()
    return model(tokens[starts.unsqueeze(1) + torch.arange(example.LENGTH + 1)]).item()
