"""Every kind of model, under every wrapper, through every operation, against a slow reference in float64."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import polyak
import zoo
from operations import MODELS, OPERATIONS, WRAPPERS, Run, check, features, update

pytestmark = [
    pytest.mark.filterwarnings("ignore:the average is .* after 0 updates"),
    pytest.mark.filterwarnings("ignore:.*_norm.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.protects
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_under_every_wrapper_through_every_operation(model, wrapper, operation, tmp_path):
    check(model, wrapper, operation, tmp_path)


@pytest.mark.protects
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_parameters_under_fsdp_have_their_bare_names():
    """Where there is one rank, which has all of them."""

    def wrap(model):
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))

    run = Run(zoo.mlp, wrap, features)
    assert list(run.actions) == list(zoo.mlp().state_dict())
    run.train()
    update(run)
    raw = zoo.clone(run.state())
    with run.average.swapped():
        inside = run.outputs(run.model)
    assert not torch.equal(inside, run.outputs(run.model))
    assert zoo.bit_equal(run.state(), raw)
    zoo.mlp().load_state_dict(run.average.weights(), strict=True)
    sharded = fully_shard(zoo.mlp(), mesh=init_device_mesh("cpu", (1,)))
    average = polyak.WeightAverage(sharded)
    average.update()
    zoo.mlp().load_state_dict(average.weights(), strict=True)
