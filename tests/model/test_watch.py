"""What changes under an average: tensors and modules that are replaced, graphs, default devices, parts of models."""

import copy
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import polyak
import zoo
from polyak.kernels import native, tried_way
from polyak.kernels.native import trial, work
from polyak.kernels.native import way as asking
from polyak.model.watch import Watch

needs_c = pytest.mark.skipif(tried_way() is None, reason="needs the C library, and a Python and torch that it can ask")


@pytest.fixture(params=[pytest.param("c", marks=needs_c), "python"], autouse=True)
def way(request, monkeypatch):
    """Every test of this file runs with the check in C and with that in Python."""
    if request.param == "python":
        monkeypatch.setenv("POLYAK_WATCH", "python")
    assert Watch(zoo.mlp()).note == ("" if request.param == "c" else "POLYAK_WATCH=python asks for it")
    return request.param


@pytest.mark.protects
class TestWatch:
    """What the check of every update sees."""

    def test_a_parameter_in_a_module_that_had_none(self):
        model = zoo.mlp()
        average = polyak.WeightAverage(model)
        average.update()
        model.scale = nn.Parameter(torch.ones(1))
        with pytest.raises(polyak.MismatchError, match=r"Only the model: 'scale'"):
            average.update()

    def test_another_parameter_in_the_same_memory(self):
        model = zoo.mlp()
        average = polyak.WeightAverage(model)
        average.update()
        model[0].weight = nn.Parameter(model[0].weight.data)
        zoo.drift(model)
        average.update()
        optimizer = torch.optim.SGD([model[0].weight], lr=0.1)
        model[0].weight.grad = torch.ones_like(model[0].weight)
        with average.swapped(), pytest.raises(polyak.StateError, match=r"it would train the average"):
            optimizer.step()

    def test_a_buffer_that_is_replaced_beside_a_sparse_one(self):
        model = nn.Module()
        model.weight = nn.Parameter(torch.ones(2))
        model.register_buffer("graph", torch.eye(2).to_sparse())
        model.register_buffer("running", torch.zeros(2))
        average = polyak.WeightAverage(model, polyak.Exponential(0.5))
        average.update()
        model.running = torch.full((2,), 4.0)
        average.update()
        assert average.weights()["running"].tolist() == [2.0, 2.0]

    def test_a_buffer_that_gives_way_to_one_without_an_address(self):
        model = nn.Module()
        model.weight = nn.Parameter(torch.ones(2))
        model.register_buffer("running", torch.zeros(2, 2))
        average = polyak.WeightAverage(model, polyak.Exponential(0.5))
        average.update()
        model.running = torch.eye(2).to_sparse()
        with pytest.raises(
            polyak.MismatchError, match=r"'running' of the model is a Tensor of layout torch.sparse_coo"
        ):
            average.update()

    def test_what_is_looked_at_for_nans_follows_the_model(self):
        model = zoo.mlp()
        average = polyak.WeightAverage(model, nonfinite="raise")
        average.update()
        model[0].weight = nn.Parameter(torch.full_like(model[0].weight, float("nan")))
        with pytest.raises(polyak.StateError, match=r"holds NaNs or infinities in '0.weight'"):
            average.update()


def replace_data(model):
    model[0].weight.data = torch.full((4, 4), 3.0)


def set_memory(model):
    with torch.no_grad():
        model[0].weight.set_(torch.full((4, 4), 3.0))


def swap_substance(model):
    torch.utils.swap_tensors(model[0].weight, nn.Parameter(torch.full((4, 4), 3.0)))


def put_into_the_dictionary(model):
    model[0]._parameters["weight"] = nn.Parameter(torch.full((4, 4), 3.0))


def set_attribute(model):
    model[0].weight = nn.Parameter(torch.full((4, 4), 3.0))


def replace_the_module(model):
    model[0] = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        model[0].weight.fill_(3.0)


def square():
    """One module whose weight is a square matrix, and which has a parameter and a buffer that are None."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    model[0].register_buffer("scale", None)
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(16.0).view(4, 4))
    return model


@pytest.mark.protects
class TestEachChange:
    """Every way in which a tensor is exchanged under an average, and what the very next update does."""

    @pytest.mark.parametrize(
        "change",
        [replace_data, set_memory, swap_substance, put_into_the_dictionary, set_attribute, replace_the_module],
    )
    def test_is_followed(self, change):
        model = square()
        average = polyak.WeightAverage(model, polyak.Exponential(0.5))
        change(model)
        average.update()
        expected = (torch.arange(16.0).view(4, 4) + 3) / 2
        assert torch.equal(average.weights()["0.weight"], expected)

    @needs_c
    def test_another_order_in_the_same_memory_is_followed(self, way):
        if way == "python":
            pytest.skip("the check in Python compares addresses only")
        model = square()
        average = polyak.WeightAverage(model, polyak.Exponential(0.5))
        first = model[0].weight.detach().clone()
        model[0].weight.data = model[0].weight.data.t()
        average.update()
        assert torch.equal(average.weights()["0.weight"], (first + first.t()) / 2)

    def test_a_name_that_was_none_and_one_more_name(self):
        for name in ("bias", "other"):
            model = square()
            average = polyak.WeightAverage(model, polyak.Exponential(0.5))
            model[0].register_parameter(name, nn.Parameter(torch.zeros(4)))
            with pytest.raises(polyak.MismatchError, match=rf"Only the model: '0.{name}'"):
                average.update()

    def test_memory_that_is_given_back(self):
        model = square()
        average = polyak.WeightAverage(model, polyak.Exponential(0.5))
        model[0].weight.untyped_storage().resize_(0)
        with pytest.raises(polyak.StateError, match=r"the memory of '0.weight' was freed"):
            average.update()

    def test_another_dtype(self):
        model = square()
        average = polyak.WeightAverage(model, polyak.Exponential(0.5))
        model.double()
        with pytest.raises(polyak.MismatchError, match=r"torch.float64, and was torch.float32"):
            average.update()

    def test_another_name_and_another_dictionary_are_seen_by_a_swap(self):
        model = square()
        average = polyak.WeightAverage(model, polyak.Exponential(0.5))
        average.update()
        weight = model[0]._parameters.pop("weight")
        model[0]._parameters["kernel"] = weight
        with pytest.raises(polyak.MismatchError, match=r"Only the average: '0.weight'. Only the model: '0.kernel'"):
            average.swap_in()
        model = square()
        average = polyak.WeightAverage(model, polyak.Exponential(0.5))
        average.update()
        model[0].__dict__["_parameters"] = {"weight": nn.Parameter(torch.full((4, 4), 5.0))}
        with average.swapped():
            assert torch.equal(model[0].weight, torch.arange(16.0).view(4, 4))
        assert torch.equal(model[0].weight, torch.full((4, 4), 5.0))


class Rebinds(nn.Module):
    """A forward pass binds a buffer to a view of itself, as some do to leave a graph."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("running_mean", torch.zeros(3))

    def forward(self, inputs):
        self.running_mean = self.running_mean.detach()
        return inputs * self.weight + self.running_mean


@pytest.mark.protects
class TestAnotherObjectInTheSameMemory:
    def test_in_the_model_is_followed_and_nothing_is_planned_anew(self):
        model = Rebinds()
        average = polyak.WeightAverage(model, polyak.Exponential(0.5))
        plan = average.plan
        for number in range(3):
            model(torch.ones(3))
            with torch.no_grad():
                model.running_mean.fill_(number + 1.0)
            average.update()
        assert average.plan is plan
        assert torch.equal(average.weights()["running_mean"], torch.full((3,), 2.125))
        with average.swapped():
            assert torch.equal(model.running_mean, torch.full((3,), 2.125))
        assert torch.equal(model.running_mean, torch.full((3,), 3.0))

    @pytest.mark.parametrize(
        "rebind",
        [
            lambda live: live(torch.ones(3)),
            lambda live: live.load_state_dict(live.state_dict(), assign=True),
            lambda live: setattr(live, "weight", nn.Parameter(live.weight.data)),
        ],
    )
    def test_in_a_live_module_is_no_error(self, rebind):
        model = Rebinds()
        average = polyak.WeightAverage(model, polyak.Exponential(0.5))
        live = average.live_module()
        rebind(live)
        with torch.no_grad():
            model.weight.fill_(3.0)
        average.update()
        assert torch.equal(live.weight, torch.full((3,), 2.0))

    def test_that_is_read_otherwise_is_a_change(self, way):
        if way == "python":
            pytest.skip("Python's check compares addresses alone")
        model = zoo.MODELS["complex"]()
        average = polyak.WeightAverage(model, polyak.Exponential(0.5))
        first = model.weight.detach().clone()
        model.weight = nn.Parameter(model.weight.data.conj())
        average.update()
        assert torch.equal(average.weights()["weight"].resolve_conj(), torch.complex(first.real, 0 * first.imag))

    def test_many_at_once(self):
        model = many(1000)
        average = polyak.WeightAverage(model, polyak.Exponential(0.5))
        for module in model.wide, *model:
            for name, parameter in list(module._parameters.items()):
                module._parameters[name] = nn.Parameter(parameter.data)
        plan = average.plan
        average.update()
        assert average.plan is plan
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        with average.swapped(), pytest.raises(polyak.StateError, match="it would train the average"):
            optimizer.step()


@pytest.mark.protects
def test_a_tensor_whose_sizes_only_python_knows_is_an_error_and_no_deadlock():
    """In a process of its own: several threads look, and one that asked Python would wait for ever."""
    program = (
        "import torch, polyak; torch.set_num_threads(2);"
        "model = torch.nn.ParameterList(torch.randn(3) for _ in range(700));"
        "average = polyak.WeightAverage(model);"
        "nested = lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(1)], layout=torch.jagged);"
        "[setattr(parameter, 'data', nested()) for parameter in model];"
        "average.update()"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=60)
    assert run.returncode == 1, run.stderr[-2000:]


@pytest.mark.protects
def test_a_parameter_that_becomes_a_wrapper_in_place_is_an_error():
    from torch.testing._internal.two_tensor import TwoTensor

    model = zoo.mlp()
    average = polyak.WeightAverage(model, polyak.Exponential(0.5))
    model._apply(lambda tensor: TwoTensor(tensor.clone(), tensor.clone()))
    with pytest.raises(polyak.MismatchError, match=r"a .*TwoTensor.* which cannot be averaged|cannot be averaged"):
        average.update()


@pytest.mark.protects
def test_a_mode_that_keeps_tensors_does_not_turn_the_check_in_c_off(way):
    class Keeps(TorchDispatchMode):
        kept: ClassVar = []

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            if isinstance(result, torch.Tensor):
                self.kept.append(weakref.ref(result))
            return result

    trial.tried_way.cache_clear()
    with Keeps():
        average = polyak.WeightAverage(zoo.mlp())
    assert (average.report().watch_note == "") == (way == "c")


def test_dictionaries_that_are_properties():
    class Property(nn.Module):
        _buffers = property(lambda self: {}, lambda self, value: None)

    model = nn.Sequential(Property(), nn.Linear(2, 2))
    average = polyak.WeightAverage(model, polyak.Exponential(0.5))
    average.update()
    with average.swapped():
        pass


class Subclass(nn.Parameter):
    """A tensor of a class of its own, as quantisation and tracking libraries have."""


@pytest.mark.protects
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 1, 2, 1, 2, 1, 2), (3,) * 6])
@pytest.mark.parametrize("kind", [nn.Parameter, Subclass])
def test_tensors_of_every_number_of_dimensions(shape, kind):
    model = nn.Module()
    model.weight, model.other = kind(torch.ones(shape)), nn.Parameter(torch.ones(2))
    average = polyak.WeightAverage(model, polyak.Exponential(0.5))
    average.update()
    assert average._core.source.is_current()
    model.weight.data = torch.full(shape, 3.0)
    assert average._core.source.is_current() == (0 in shape)
    average.update()
    assert torch.equal(average.weights()["weight"], torch.full(shape, 2.0))


@pytest.mark.protects
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_of_model_and_average_follows_its_own_model(duplicate):
    model = zoo.mlp()
    average = polyak.WeightAverage(model, polyak.Exponential(0.5))
    average.update()
    kept = average.weights()
    other_model, other = duplicate((model, average))
    with torch.no_grad():
        other_model[0].weight.fill_(7.0)
    other.update(), average.update()
    assert torch.equal(other.weights()["0.weight"], (kept["0.weight"] + 7) / 2)
    assert zoo.bit_equal(average.weights(), kept)
    assert other._core.source.is_current()


@pytest.mark.protects
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_sees_changes():
    model = square()
    average = polyak.WeightAverage(model, polyak.Exponential(0.5))
    average.update()
    process = os.fork()
    if process == 0:
        replace_data(model)
        average.update()
        right = torch.equal(average.weights()["0.weight"], (torch.arange(16.0).view(4, 4) + 3) / 2)
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


@pytest.mark.protects
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_threads_of_its_parent(monkeypatch):
    model = nn.ParameterList(torch.randn(64, 64) for _ in range(1000))
    average = polyak.WeightAverage(model, polyak.Exponential(0.5))
    monkeypatch.setattr(work.CREW, "_alone", 0)  # an earlier call may have waited
    for _ in range(20):
        average.update()
    state = average.state_dict()
    model[0].requires_grad_(False)
    other = polyak.WeightAverage(model, polyak.Exponential(0.5))
    process = os.fork()
    if process == 0:
        average.load_state_dict(state)
        with warnings.catch_warnings(action="ignore") if sys.version_info >= (3, 11) else warnings.catch_warnings():
            other.swap_in()
            other.swap_out()
        polyak.WeightAverage(model, polyak.Exponential(0.5)).update()
        os._exit(0)
    ended, waited = 0, 0.0
    while not ended and waited < 20:
        ended, _ = os.waitpid(process, os.WNOHANG)
        time.sleep(0.01)
        waited += 0.01
    if not ended:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    assert ended


def many(count):
    model = nn.ModuleList(nn.Linear(3, 3) for _ in range(count // 2))
    model.wide = nn.ParameterList(torch.ones(2) for _ in range(count))
    return model


@pytest.mark.protects
@pytest.mark.parametrize("position", [0, 63, 64, 700, 1023, 1024, 1999])
def test_a_change_anywhere_among_many_tensors_is_seen(position):
    model = many(1000)
    watch = Watch(model)
    assert watch.is_current()
    parameter = list(model.parameters())[position]
    parameter.data = parameter.data.clone()
    assert not watch.is_current()


class TestWhereItCannotBeMade:
    @pytest.fixture(autouse=True)
    def asked_anew(self):
        trial.tried_way.cache_clear()
        yield
        trial.tried_way.cache_clear()

    def check(self, reason):
        average = polyak.WeightAverage(model := zoo.mlp(), polyak.Exponential(0.5))
        average.update()
        model[0].weight.data = torch.zeros(5, 6)
        average.update()
        report = average.report()
        assert reason in report.watch_note
        assert f"the check of every update is made in Python: {report.watch_note}" in str(report)

    @pytest.fixture
    def not_asked_for(self, monkeypatch):
        monkeypatch.delenv("POLYAK_WATCH", raising=False)

    def test_python_without_its_lock(self, monkeypatch, not_asked_for):
        monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
        self.check("it cannot ask this Python and torch")

    def test_a_torch_that_keeps_its_tensors_elsewhere(self, monkeypatch, not_asked_for):
        monkeypatch.setattr(asking, "words", lambda value, count: [0] * count)
        self.check("it cannot ask this Python and torch")

    def test_a_torch_without_its_functions(self, monkeypatch, not_asked_for):
        monkeypatch.setattr(asking, "_TORCH", ("data_ptr", "dim", "sizes", "strides", "no_such_thing"))
        self.check("it cannot ask this Python and torch")

    def test_a_change_that_goes_unseen(self, monkeypatch, not_asked_for):
        monkeypatch.setattr(trial, "_CHANGES", (*trial._CHANGES, lambda *_: None))
        self.check("it cannot ask this Python and torch")

    def test_kernels_without_the_one_in_c(self, monkeypatch, not_asked_for):
        monkeypatch.setenv("POLYAK_KERNELS", "foreach,staged")
        self.check("POLYAK_KERNELS leaves out native")

    def test_one_that_is_not_known(self, monkeypatch):
        monkeypatch.setenv("POLYAK_WATCH", "c++")
        with pytest.raises(ValueError, match=r"POLYAK_WATCH='c\+\+': it is 'python', or not set"):
            polyak.WeightAverage(zoo.mlp())


@pytest.mark.protects
def test_a_graph_that_used_a_live_module_notices():
    model = zoo.mlp()
    average = polyak.WeightAverage(model, polyak.Exponential(0.5))
    teacher = average.live_module()
    zoo.drift(model)
    inputs = torch.randn(4, 6, requires_grad=True)
    loss = teacher(inputs).square().mean()
    average.update()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.protects
@pytest.mark.parametrize("make", [zoo.mlp, zoo.MODELS["bfloat16"], zoo.MODELS["float16"]])
def test_a_graph_made_inside_of_a_swap_notices_that_it_is_over(make):
    model = make()
    average = polyak.WeightAverage(model, polyak.Exponential(0.5))
    zoo.drift(model)
    average.update()
    with average.swapped():
        inputs = torch.randn(4, 6, dtype=model[0].weight.dtype, requires_grad=True)
        loss = model(inputs).square().mean()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.protects
def test_another_default_device():
    model = zoo.batchnorm()
    with torch.device("meta"):
        average = polyak.WeightAverage(model, polyak.Exponential(0.5), nonfinite="skip")
        average.update()
        with average.swapped():
            pass
        average.report(), average.state_dict()
    assert all(tensor.device.type == "cpu" for tensor in average.weights().values())


@pytest.mark.protects
def test_a_parameter_that_is_a_conjugate_view():
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64).conj())
    model.register_buffer("negative", torch.randn(3, dtype=torch.complex64).conj().imag)
    average = polyak.WeightAverage(model, polyak.Exponential(0.5))
    first = model.weight.detach().resolve_conj().clone()
    with torch.no_grad():
        model.weight.mul_(3)
    average.update()
    torch.testing.assert_close(average.weights()["weight"].resolve_conj(), 2 * first)
    with average.swapped():
        torch.testing.assert_close(model.weight.detach().resolve_conj(), 2 * first)
    torch.testing.assert_close(model.weight.detach().resolve_conj(), 3 * first)


@pytest.mark.protects
def test_averages_of_a_model_and_of_its_part_know_one_another():
    model = zoo.mlp()
    whole, part = polyak.WeightAverage(model), polyak.WeightAverage(model[0])
    zoo.drift(model)
    whole.update(), part.update()
    for one, other in ((whole, part), (part, whole)):
        with one.swapped():
            with pytest.raises(polyak.StateError, match=r"update\(\) inside of swapped\(\)"):
                other.update()
            with pytest.raises(polyak.StateError, match=r"a swap inside of swapped\(\)"), other.swapped():
                pass


@pytest.mark.protects
def test_modules_that_say_that_they_are_equal():
    class Equal(nn.Linear):
        def __eq__(self, other):
            return isinstance(other, Equal)

        __hash__ = nn.Linear.__hash__

    model = nn.Sequential(Equal(2, 2))
    average = polyak.WeightAverage(model, polyak.Exponential(0.5))
    average.update()
    model[0] = Equal(2, 2)
    with torch.no_grad():
        model[0].weight.fill_(100.0)
    average.update()
    assert average.weights()["0.weight"].min() > 40


class WritesItsParameters(nn.Module):
    """A forward pass moves a parameter, as codebooks and `max_norm` do; others are needed by the backward pass."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
        self.code = nn.Parameter(torch.zeros(3))

    def forward(self, inputs):
        inputs = self.first(inputs)
        with torch.no_grad():
            self.code.mul_(0.9).add_(inputs.mean(0))
        return self.last(inputs)


@pytest.mark.protects
@pytest.mark.parametrize("place", ["a live module", "ModelEma"])
def test_a_module_that_writes_to_its_own_parameters_can_be_differentiated_through(place):
    model = WritesItsParameters()
    if place == "ModelEma":
        teacher = polyak.ModelEma(model).ema
    else:
        average = polyak.WeightAverage(model)
        teacher = average.live_module()
    inputs = torch.randn(2, 3, requires_grad=True)
    teacher(inputs).sum().backward()
    assert inputs.grad is not None


def test_a_live_module_that_cannot_be_made_leaves_nothing_behind():
    model = zoo.mlp()
    model.lock = threading.Lock()
    average = polyak.WeightAverage(model)
    with pytest.raises(polyak.StateError, match="cannot be copied"):
        average.live_module()
    assert not average._core.lends
    assert not average._core.live


@pytest.mark.protects
def test_what_is_made_in_inference_mode_can_be_used_outside():
    model = zoo.mlp()
    average = polyak.WeightAverage(model, polyak.Exponential(0.5))
    average.update()
    with torch.inference_mode():
        live, ema = average.live_module(), polyak.ModelEma(model)
    average.load_state_dict(copy.deepcopy(average.state_dict()))
    live(torch.randn(2, 6, requires_grad=True)).sum().backward()
    with torch.no_grad():
        ema.ema[0].weight.add_(0)


@pytest.mark.protects
@pytest.mark.parametrize("in_c", [True, False])
def test_every_change_is_counted_once(in_c, monkeypatch):
    if not in_c:
        monkeypatch.setenv("POLYAK_WATCH", "python")
    with torch.inference_mode():
        inference = torch.zeros(2)
    tensors = [torch.zeros(2), nn.Parameter(torch.zeros(3)), torch.zeros(4)[1:], inference]
    before = [tensor._version for tensor in tensors[:3]]
    versions = native.Versions(tensors)
    versions.count_change(), versions.count_change()
    assert [tensor._version for tensor in tensors[:3]] == [version + 2 for version in before]


@pytest.mark.protects
@pytest.mark.parametrize("place", ["a live module", "ModelEma"])
def test_a_module_in_training_mode_can_be_differentiated_through(place):
    model = zoo.batchnorm()
    if place == "ModelEma":
        average = polyak.ModelEma(model)
        teacher = average.ema.train()
    else:
        average = polyak.WeightAverage(model)
        teacher = average.live_module().train()
    inputs = torch.randn(4, 2, 4, 4, requires_grad=True)
    first, second = teacher(inputs), teacher(2 * inputs)
    (first + second).sum().backward()
    assert inputs.grad is not None
    loss = teacher(inputs).sum()
    average.update(model) if place == "ModelEma" else average.update()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
