"""What only a GPU can show: the cases of the kernel in Triton there, launches, synchronisation, memory, CUDA graphs."""

import copy
import math

import pytest
import torch
from torch import nn

import polyak
from has_gpu import CAN_RUN
from polyak.kernels import Plan, Row, rounding, stochastic

MARKS = [pytest.mark.gpu, pytest.mark.skipif(not CAN_RUN, reason="needs a GPU that CUDA can use, and Triton")]
pytestmark = MARKS

if CAN_RUN:
    import triton_cases as cases
    from control_cases import *  # noqa: F403  # its tests are tests here, too
    from triton_cases import *  # noqa: F403  # its tests are tests here, with the blocks that users have
    from triton_cases import pytestmark as _filters

    # The star imports have just replaced it by the marks of the cases.
    pytestmark = [*MARKS, _filters]

    from polyak.kernels.gpu.control import Control
    from polyak.kernels.gpu.launch import Triton


def mixed_rows(*, profiles=2, elements=70_000):
    """Rows of every form and source, of sizes with and without rests, many of them small."""
    torch.manual_seed(0)
    return [
        cases.make_row(
            torch.randn(size, device="cuda").to(dtype), form, profiles=profiles, name=f"{dtype} {form} {size}"
        )
        for dtype in cases.SOURCES
        for form in cases.FORMS
        for size in (1, 10, 1024, 1027, elements)
    ]


@pytest.fixture(scope="module")
def compiled():
    """One small launch of everything, so that what is measured is not the first."""
    rows = mixed_rows(elements=64)
    kernel, control = Triton(rows), Control(2, device=torch.device("cuda"))
    kernel.run([0.1, 0.2], 1)
    kernel.find_bad(control)
    control.add([0.1, 0.2])
    kernel.run_pending(control)
    torch.cuda.synchronize()


def kernels_in(run):
    """The names of what ran on the GPU."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    return [event.name for event in profile.events() if event.device_type == on_gpu and "Sync" not in event.name]


def test_an_update_is_one_launch(compiled):
    kernel = Triton(mixed_rows())
    assert kernels_in(lambda: kernel.run([0.1, 0.2], 1)) == ["update"]


def test_an_update_with_growth_on_the_device_is_few_launches(compiled):
    kernel, control = Triton(mixed_rows()), Control(2, device=torch.device("cuda"))
    assert len(kernels_in(lambda: control.add([0.1, 0.2]))) == 1
    assert kernels_in(lambda: kernel.find_bad(control)) == ["find_bad"]
    names = kernels_in(lambda: kernel.run_pending(control))
    assert names[1:] == ["settle", "update_settled"]


@pytest.mark.protects
def test_nothing_waits_and_nothing_is_allocated(compiled):
    rows = mixed_rows()
    kernel, control = Triton(rows), Control(2, device=torch.device("cuda"))
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(1, 4):
            kernel.run([0.1, 0.2], number)
            control.add([0.1, 0.2])
            kernel.find_bad(control)
            kernel.run_pending(control)
            control.note_skipped()
            control.num_skipped()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.parametrize("weight", [1e-6, 1e-4, 0.3, 0.5, 0.7, 0.9999])
def test_the_bits_of_torch_on_the_gpu(weight):
    torch.manual_seed(0)
    source, average = torch.randn(2, 1 << 22, device="cuda")
    right = torch.lerp(average, source, weight)
    Triton([Row("x", source, (average,))]).run([weight], 0)
    assert torch.equal(average.view(torch.int32), right.view(torch.int32))


def test_the_bits_of_the_cpu_on_larger_tensors(compiled):
    rows = mixed_rows(elements=300_001)
    on_cpu = [
        Row(
            row.name,
            row.source.cpu(),
            tuple(t.cpu() for t in row.averages),
            row.mode,
            tuple(t.cpu() for t in row.beside),
            key=row.key,
        )
        for row in rows
    ]
    step = rounding.step_key(7, 3)
    Triton(rows).run([0.01, 0.6], step)
    Plan(on_cpu, kernels=["staged"], seed=7).run([0.01, 0.6], 3)
    for row, twin in zip(rows, on_cpu, strict=True):
        cases.assert_same(row, twin.tensors[1:])


def test_a_thousand_small_tensors_and_a_large_one():
    torch.manual_seed(0)
    sources = [*torch.randn(1000, 32, 32, device="cuda").unbind(), torch.randn(5000, 5001, device="cuda")]
    averages = [torch.randn_like(source) for source in sources]
    right = torch._foreach_lerp(averages, sources, 0.01)
    plan = Plan([Row(str(i), *pair) for i, pair in enumerate(zip(sources, ((a,) for a in averages), strict=True))])
    assert [group.kernel for group in plan.groups] == ["triton"]
    plan.run([0.01])
    assert all(map(torch.equal, averages, right))


def test_more_than_two_to_the_31_elements(compiled):
    """Whole and in two parts, which count on where the first ends, are alike."""
    size, middle = 2**31 + 70, 2**30 + 8
    source = torch.randn(size, device="cuda", dtype=torch.bfloat16)
    whole = torch.randn(size, device="cuda", dtype=torch.bfloat16)
    parts = whole.clone()
    first = 2**33 - 1000
    Triton([Row("x", source, (whole,), stochastic, key=5, first=first)]).run([0.1], cases.STEP)
    rows = [
        Row("x", source[:middle], (parts[:middle],), stochastic, key=5, first=first),
        Row("x", source[middle:], (parts[middle:],), stochastic, key=5, first=first + middle),
    ]
    tail = cases.clone(Row("x", source[-70:], (parts[-70:],), stochastic, key=5, first=first + size - 70))
    right = cases.expected(tail, [0.1])
    Triton(rows).run([0.1], cases.STEP)
    assert torch.equal(whole, parts)
    assert torch.equal(whole[-70:].cpu(), right[0])


@pytest.mark.protects
def test_a_captured_step_and_update_follow_a_changing_weight_and_leave_out_what_was_skipped():
    torch.manual_seed(0)
    parameter = torch.randn(5000, device="cuda")
    parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    rows = [cases.make_row(parameter, form, name=str(form)) for form in cases.FORMS]
    twins = [cases.clone(row) for row in rows]
    kernel, control = Triton(rows), Control(1, device=torch.device("cuda"), seed=7)

    def step():
        optimizer.step()
        kernel.find_bad(control)
        kernel.run_pending(control)

    # Gradients of zero and nothing pending: nothing moves yet.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    pending, number = 0.0, 0
    for growth, how in [
        (0.5, ""),
        (0.01, "nan"),
        (0.02, ""),
        (0.3, "nan"),
        (1e-4, "nan"),
        (math.inf, ""),
        (0.1, ""),
    ]:
        good = parameter.clone()
        parameter.grad.copy_(torch.randn_like(parameter))
        if how == "nan":
            parameter.grad[77] = math.nan
        control.add([growth])
        graph.replay()
        pending += growth
        if how:
            assert kernel.bad_names() == [row.name for row in rows]
            parameter.copy_(good)
        else:
            number += 1
            weight = -math.expm1(-pending)
            for twin in twins:
                tensors = cases.expected(twin, [weight], rounding.step_key(7, number))
                for mine, other in zip(twin.tensors[1:], tensors, strict=True):
                    mine.copy_(other)
            pending = 0.0
        for row, twin in zip(rows, twins, strict=True):
            cases.assert_same(row, twin.tensors[1:], growth)
    assert control.read() == ([0.0], 4)


@pytest.mark.protects
def test_the_number_of_skipped_steps_is_known_when_the_device_is_done():
    kernel = Triton([Row("x", torch.full((4,), math.nan, device="cuda"), (torch.zeros(4, device="cuda"),))])
    for is_compiled in (False, True):
        control = Control(1, device=torch.device("cuda"))
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)
        for _ in range(3):
            control.add([0.1])
            kernel.find_bad(control)
            kernel.run_pending(control)
            control.note_skipped()
            # While it compiles, the device gets done.
            assert not is_compiled or control.num_skipped() == 0
        torch.cuda.synchronize()
        assert control.num_skipped() == 3


def models(dtype):
    torch.manual_seed(0)
    on_cpu = nn.Sequential(nn.Linear(33, 47), nn.BatchNorm1d(47), nn.Linear(47, 5)).to(dtype)
    return on_cpu, copy.deepcopy(on_cpu).cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_an_average_of_a_model_is_that_of_the_same_model_on_the_cpu(dtype):
    on_cpu, on_gpu = models(dtype)
    averages = [polyak.WeightAverage(model) for model in (on_cpu, on_gpu)]
    for _ in range(5):
        with torch.no_grad():
            for one, other in zip(on_cpu.state_dict().values(), on_gpu.state_dict().values(), strict=True):
                one.copy_(torch.randn(one.shape))
                other.copy_(one)
        for average in averages:
            average.update()
    right, found = (average.weights() for average in averages)
    assert right.keys() == found.keys()
    for name in right:
        assert torch.equal(right[name], found[name].cpu()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_swap_on_the_gpu(dtype):
    _, model = models(dtype)
    average = polyak.WeightAverage(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    average.update()
    raw = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {name: tensor.clone() for name, tensor in average.weights().items()}
    addresses = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    with average.swapped():
        for name, tensor in model.state_dict().items():
            assert torch.allclose(tensor.float(), weights[name].float(), rtol=1e-2), name
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, raw[name])
        assert tensor.data_ptr() == addresses[name]
    for name, tensor in average.weights().items():
        assert torch.equal(tensor, weights[name])


def test_an_update_of_a_model_does_not_wait(compiled):
    _, model = models(torch.float32)
    average = polyak.WeightAverage(model)
    average.update()
    torch.cuda.set_sync_debug_mode("error")
    try:
        average.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
