"""LoRA on a real peft model: only the adapter is stored, averaged and saved."""

import copy

import pytest
import torch
from safetensors.torch import load_file

import polyak
import zoo

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:the average is .* after 0 updates"),
]


@pytest.fixture
def adapted():
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 64, "n_positions": 16}
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
    bare = copy.deepcopy(base)
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    return peft.get_peft_model(base, config), bare


def trained(model, num_steps=3):
    average = polyak.WeightAverage(model, polyak.Uniform())
    for _ in range(num_steps):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        average.update()
    return average


@pytest.mark.protects
def test_only_the_adapter_is_stored(adapted):
    model, _ = adapted
    average = trained(model)
    size = sum(4 * parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert average.report().num_bytes == size
    (tensors,) = average.state_dict()["averages"].values()
    assert all("lora_" in name for name in tensors["average"])
    assert average.state_dict()["copies"].popitem()[1] == {}


@pytest.mark.protects
def test_the_export_loads_as_an_adapter(adapted, tmp_path):
    model, bare = adapted
    average = trained(model)
    average.export(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    tokens = torch.arange(8).view(1, 8)
    with average.swapped(), torch.no_grad():
        expected = model.eval()(tokens).logits
    loaded = peft.PeftModel.from_pretrained(bare, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, expected)


@pytest.mark.protects
def test_an_exported_file_is_what_peft_would_save(adapted, tmp_path):
    model, _ = adapted
    average = trained(model)
    average.export(tmp_path / "adapter.safetensors")
    with average.swapped():
        model.save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert zoo.bit_equal(load_file(tmp_path / "adapter.safetensors"), theirs)
