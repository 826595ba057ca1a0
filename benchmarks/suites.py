"""Who is timed beside whom. A new contender is one more row of a suite, with the function that builds it.

The contenders of a suite keep averages of the same dtype and are called in turn, on each of its shapes. Those that
come first are built first, where memory does not suffice for all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import limits, ours, peers, timm_file
from benchmarks.contender import Contender, Kind
from benchmarks.lightning_callback import ema_weight_averaging

LIMITED_BY_COPIES = "copy of as many bytes"


@dataclass(frozen=True)
class Suite:
    """Contenders that are timed together.

    Attributes:
        name: for the command line.
        title: for tables.
        shapes: the names of the models that it runs on; larger ones are for GPUs only.
        source: the dtype of the model.
        average: the dtype of the averages; for the memory that they take.
        bytes_per_parameter: what an update must move, each byte once: source, average in and out, second terms.
        contenders: who is timed.
        limits: on a CPU; on a GPU it is the device's own copy of as many bytes.
        note: who is not here, and why.
    """

    name: str
    title: str
    shapes: Sequence[str]
    source: torch.dtype
    average: torch.dtype
    bytes_per_parameter: int
    contenders: Sequence[Contender]
    limits: Sequence[Contender]
    note: str = ""

    def all_contenders(self, device: torch.device) -> list[Contender]:
        """The first of them is this library's, the second the limit: they are built whatever else fits."""
        copies = partial(limits.copy_of, bytes_per_parameter=self.bytes_per_parameter)
        on_gpu = [Contender(LIMITED_BY_COPIES, Kind.LIMIT, copies)]
        first, *others = self.contenders
        return [first, *(self.limits if device.type == "cpu" else on_gpu), *others]


def flat_limits(*names: str) -> list[Contender]:
    return [Contender(name, Kind.LIMIT, limits.FLAT_FORMS[name], num_averages=2) for name in names]


def lerp_of_as_many_bytes(count: int) -> Contender:
    build = partial(limits.lerp_of, bytes_per_parameter=count)
    return Contender("flat lerp_ of as many bytes", Kind.LIMIT, build, num_averages=2)


EVERY_SHAPE = ("small", "resnet50", "vit", "gpt2", "llama-1b", "llama-7b")

FLOAT32 = Suite(
    name="float32",
    title="float32",
    shapes=(*EVERY_SHAPE, "convnext", "bert"),
    source=torch.float32,
    average=torch.float32,
    bytes_per_parameter=12,
    contenders=(
        Contender("polyak.WeightAverage", Kind.OURS, ours.weight_average),
        Contender("timm ModelEmaV3", Kind.PEER, timm_file.model_ema_v3),
        Contender("torch AveragedModel", Kind.PEER, peers.averaged_model),
        Contender("polyak.ModelEma", Kind.OURS, ours.model_ema),
        Contender("ema-pytorch", Kind.PEER, peers.ema_pytorch_foreach),
        Contender("torch-ema", Kind.PEER, peers.torch_ema_loop),
        Contender("diffusers EMAModel", Kind.PEER, peers.diffusers_foreach, num_averages=2),
        Contender("Lightning EMAWeightAveraging", Kind.PEER, ema_weight_averaging),
        Contender("timm ModelEma", Kind.PEER, timm_file.model_ema),
        Contender("timm ModelEmaV2", Kind.PEER, timm_file.model_ema_v2),
        Contender("the seed's formula", Kind.SEED, peers.seed_formula),
    ),
    limits=flat_limits("flat lerp_"),
)
MIXED = Suite(
    name="mixed",
    title="bfloat16 to float32",
    shapes=EVERY_SHAPE,
    source=torch.bfloat16,
    average=torch.float32,
    bytes_per_parameter=10,
    contenders=(
        Contender("polyak.WeightAverage", Kind.OURS, ours.weight_average),
        Contender("timm ModelEmaV3", Kind.PEER, timm_file.model_ema_v3_float32),
        Contender("torch-ema", Kind.PEER, peers.torch_ema_float32),
        Contender("diffusers EMAModel", Kind.PEER, peers.diffusers_float32, num_averages=2),
        Contender("ema-pytorch", Kind.PEER, peers.ema_pytorch_float32),
    ),
    limits=flat_limits("flat mul_, add_", "flat copy, lerp_ by chunks", "flat, polyak's kernel"),
    note="torch AveragedModel's multi_avg_fn raises here; its avg_fn, which is Lightning's, rounds each contribution "
    "to bfloat16, and so do timm's first two classes.",
)
STOCHASTIC = Suite(
    name="stochastic",
    title="bfloat16, stochastic rounding",
    shapes=EVERY_SHAPE[:-1],
    source=torch.bfloat16,
    average=torch.bfloat16,
    bytes_per_parameter=6,
    contenders=(
        Contender("polyak.WeightAverage", Kind.OURS, ours.stochastic),
        Contender("timm ModelEmaV3", Kind.PEER, timm_file.model_ema_v3),
    ),
    limits=(
        Contender(
            "flat, polyak's kernel",
            Kind.LIMIT,
            partial(limits.flat_average, dtype=torch.bfloat16),
            num_averages=2,
        ),
        lerp_of_as_many_bytes(6),
    ),
    note="The other peers round to nearest, and so averages in bfloat16 do not move.",
)
COMPENSATED = Suite(
    name="compensated",
    title="float32, compensated",
    shapes=EVERY_SHAPE[:-1],
    source=torch.float32,
    average=torch.float32,
    bytes_per_parameter=16,
    contenders=(
        Contender("compensated", Kind.OURS, ours.compensated, num_averages=2),
        Contender("plain", Kind.REFERENCE, ours.weight_average),
    ),
    limits=(
        Contender(
            "flat, polyak's kernel",
            Kind.LIMIT,
            partial(limits.flat_average, compensated=True),
            num_averages=3,
        ),
        lerp_of_as_many_bytes(16),
    ),
    note="No peer has it.",
)
PROFILES = Suite(
    name="profiles",
    title="float32, several profiles",
    shapes=("small", "resnet50", "vit", "llama-1b"),  # it keeps 13 averages
    source=torch.float32,
    average=torch.float32,
    bytes_per_parameter=12,
    contenders=(
        Contender("1 profile", Kind.OURS, partial(ours.together, count=1)),
        Contender("2 profiles", Kind.OURS, partial(ours.together, count=2), num_averages=2),
        Contender("4 profiles", Kind.OURS, partial(ours.together, count=4), num_averages=4),
        Contender("2 averages", Kind.REFERENCE, partial(ours.separately, count=2), num_averages=2),
        Contender("4 averages", Kind.REFERENCE, partial(ours.separately, count=4), num_averages=4),
    ),
    limits=(),
    note="Profiles are in one WeightAverage, averages are as many WeightAverages.",
)
SUITES = (FLOAT32, MIXED, STOCHASTIC, COMPENSATED, PROFILES)
