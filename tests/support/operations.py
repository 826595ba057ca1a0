"""Every kind of model, every wrapper and every operation, for tables of all of them."""

import copy
import io
import threading
import warnings
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

import polyak
import zoo
from reference.recursion import widen

DECAY = 0.9
RULES = {"*.expert_bias": "average"}


class CachedValue(nn.Module):
    """Keeps a value that has a graph, made anew at each forward."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, inputs):
        self.doubled = self.layer.weight * 2
        return nn.functional.linear(inputs, self.doubled)


class Locked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.lock = threading.Lock()

    def forward(self, inputs):
        with self.lock:
            return self.layer(inputs)


class Experts(nn.Module):
    """Two experts and a bias on their choice, which is a buffer that training moves."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(6, 2)
        self.experts = nn.ModuleList(nn.Linear(6, 3) for _ in range(2))
        self.register_buffer("expert_bias", torch.randn(2))

    def forward(self, inputs):
        shares = (self.router(inputs) + self.expert_bias).softmax(-1)
        return sum(shares[:, [i]] * expert(inputs) for i, expert in enumerate(self.experts))


def lora():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    return peft.get_peft_model(zoo.mlp(), peft.LoraConfig(r=2, target_modules=["0", "2"]))


def features():
    return torch.randn(4, 6)


# What a model is made by, and what it is called with.
MODELS = {
    "MLP": (zoo.mlp, features),
    "BatchNorm": (zoo.batchnorm, lambda: torch.randn(4, 2, 4, 4)),
    "tied head": (zoo.TiedTransformer, lambda: torch.randint(0, 11, (2, 5))),
    "weight norm, old": (lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 3))), features),
    "weight norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 3))), features),
    "spectral norm, old": (lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 3))), features),
    "spectral norm": (lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 3))), features),
    "cached value": (CachedValue, features),
    "lock": (Locked, features),
    "complex": (zoo.Complex, lambda: torch.randn(4, 3)),
    "buffers": (zoo.Buffers, lambda: torch.randn(2, 4)),
    "experts": (Experts, features),
    "LoRA": (lora, features),
    "bfloat16": (lambda: zoo.mlp().bfloat16(), lambda: features().bfloat16()),
}


class DataParallelLike(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs, **options):
        return self.module(*inputs, **options)


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


WRAPPERS = {
    "bare": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled in place": compiled_in_place,
    "DataParallel-like": DataParallelLike,
    "DDP": nn.parallel.DistributedDataParallel,
    "checkpoint-wrapped": checkpoint_wrapper,
}

# Cells that cannot be, with the reason.
IMPOSSIBLE = {
    ("lock", "module"): "a lock cannot be copied",
    ("lock", "live_module"): "a lock cannot be copied",
}


@dataclass
class Run:
    """A model in training, its average, and the same average made slowly."""

    make: object
    wrap: object
    inputs: object

    def __post_init__(self):
        torch.manual_seed(0)
        self.bare = self.make()
        self.model = self.wrap(self.bare)
        self.call = self.inputs()
        self.model(self.call)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="rules: no tensor")
            self.average = polyak.WeightAverage(self.model, polyak.Exponential(DECAY), rules=RULES)
        self.actions = {entry.name: entry.action for entry in self.average.report().entries}
        self.expected = {name: widen(tensor) for name, tensor in self.state().items()}

    def state(self):
        return {name: tensor for name, tensor in tensors_of(self.bare).items() if name in self.actions}

    def train(self, num_steps=3):
        for _ in range(num_steps):
            drift_trained(self.bare)
            self.average.update()
            for name, tensor in self.state().items():
                kept = DECAY if self.actions[name] == "average" else 0.0
                self.expected[name] = kept * self.expected[name] + (1 - kept) * widen(tensor)

    def outputs(self, model):
        model.eval()
        with torch.no_grad():
            return model(self.call)

    def fresh(self):
        """A bare model of the same kind, with the averaged weights loaded strictly."""
        model = copy.deepcopy(self.bare) if self.make is lora else self.make()
        model.load_state_dict(self.average.weights(), strict=True)
        return model


def tensors_of(model):
    """Parameters and buffers by the names that the bare model gives them, whatever was wrapped into it."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def drift_trained(model):
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    zoo.drift(model)
    with torch.no_grad():
        for name, tensor in frozen.items():
            model.get_parameter(name).copy_(tensor)


def update(run):
    weights = run.average.weights()
    for name, expected in run.expected.items():
        if name in weights:
            found = widen(weights[name])
            assert (found - expected).abs().max() <= 3e-6 * expected.abs().max() + 1e-12, name


def swap(run):
    raw = zoo.clone(run.state())
    before = run.outputs(run.model)
    with run.average.swapped():
        inside, eager = run.outputs(run.model), run.outputs(run.bare)
        torch.testing.assert_close(inside, run.outputs(run.fresh()), atol=1e-5, rtol=1e-2 if is_half(run) else 1e-5)
        torch.testing.assert_close(inside, eager)
    assert zoo.bit_equal(run.state(), raw)
    torch.testing.assert_close(run.outputs(run.model), before)
    assert not torch.equal(inside, before)


def module(run):
    made = run.average.module()
    torch.testing.assert_close(run.outputs(made), run.outputs(run.fresh()))


def live_module(run):
    made = run.average.live_module()
    for _ in range(2):
        run.train(1)
        assert zoo.bit_equal(dict(made.state_dict()), run.average.weights())
        if not is_half(run):  # its average is in float32, and wants inputs of that
            torch.testing.assert_close(run.outputs(made), run.outputs(run.fresh()))


def state_round_trip(run):
    state = through_a_file(run.average.state_dict())
    other = polyak.WeightAverage(run.fresh(), polyak.Exponential(DECAY))
    other.load_state_dict(state)
    assert zoo.bit_equal(other.weights(), run.average.weights())


def resume(run):
    other = Run(run.make, run.wrap, run.inputs)
    other.bare.load_state_dict(run.bare.state_dict())
    other.average.load_state_dict(through_a_file(run.average.state_dict()))
    for each in (run, other):
        torch.manual_seed(1)
        each.train(2)
    assert zoo.bit_equal(run.average.weights(), other.average.weights())


def export(run, path):
    run.average.export(path)
    loaded = load_file(path)
    if run.make is lora:
        assert loaded.keys() < {name.replace(".default", "") for name in run.average.weights()}
        return
    model = run.make()
    model.load_state_dict(loaded, strict=True)
    torch.testing.assert_close(run.outputs(model), run.outputs(run.fresh()))


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def is_half(run):
    return next(run.bare.parameters()).dtype == torch.bfloat16


OPERATIONS = [update, swap, module, live_module, state_round_trip, resume, export]


def check(model, wrapper, operation, folder):
    """One operation on one kind of model under one wrapper."""
    make, inputs = MODELS[model]
    run = Run(make, WRAPPERS[wrapper], inputs)
    run.train()
    arguments = [folder / "file.safetensors"] if operation is export else []
    if (model, operation.__name__) in IMPOSSIBLE:
        with pytest.raises(polyak.StateError, match=r"cannot be copied: .* average\.swapped\(\)"):
            operation(run)
    else:
        operation(run, *arguments)
