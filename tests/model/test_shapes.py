"""The full-size model on the meta device: names and shapes only, no memory."""

import pytest
import torch

from omnimamba_model import MambaConfig, MambaLM, OmniMamba, OmniMambaConfig


@pytest.fixture(scope="module")
def full() -> OmniMamba:
    with torch.device("meta"):
        return OmniMamba(OmniMambaConfig.preset("1.3b"))


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_language_model_sizes():
    with torch.device("meta"):
        lm = MambaLM(MambaConfig.preset("1.3b"))
        small = MambaLM(MambaConfig.preset("130m"))
    assert count(lm.backbone.layers[0]) == 25_849_280
    assert count(lm) == 1_343_757_312
    assert (len(small.backbone.layers), small.config.d_model, small.config.vocab_size) == (24, 768, 50288)


def test_one_adapter_of_one_layer(full):
    layer = full.backbone.layers[0].mixer.in_proj
    assert sum(p.numel() for name, p in layer.named_parameters() if name.startswith("t2i")) == 84_480


def test_every_official_tensor_has_its_name_and_shape(full):
    layer = {
        "norm.weight": (2048,),
        "mixer.dt_bias": (64,),
        "mixer.A_log": (64,),
        "mixer.D": (64,),
        "mixer.in_proj.weight": (8512, 2048),
        "mixer.in_proj.mmu_lora_A0.weight": (8, 2048),
        "mixer.in_proj.t2i_lora_A0.weight": (8, 2048),
        "mixer.in_proj.mmu_lora_B0.weight": (8512, 8),
        "mixer.in_proj.t2i_lora_B0.weight": (8512, 8),
        "mixer.conv1d.weight": (4352, 1, 4),
        "mixer.conv1d.bias": (4352,),
        "mixer.norm.weight": (4096,),
        "mixer.out_proj.weight": (2048, 4096),
    }
    official = {
        "backbone.embedding.weight": (50288, 2048),
        "backbone.img_embeddings.word_embeddings.weight": (16384, 2048),
        "backbone.img_embeddings.project_in.projector.0.weight": (8192, 2048),
        "backbone.img_embeddings.project_in.projector.0.bias": (8192,),
        "backbone.img_embeddings.project_in.projector.2.weight": (2048, 8192),
        "backbone.img_embeddings.project_in.projector.2.bias": (2048,),
        "backbone.img_embeddings.project_in.projector.4.weight": (2048, 2048),
        "backbone.img_embeddings.project_in.projector.4.bias": (2048,),
        "backbone.pos_embed": (1, 329, 2048),
        "backbone.mmu_pos_embed": (1, 1500, 2048),
        "backbone.caption_embed.cap_proj.fc1.weight": (2048, 2048),
        "backbone.caption_embed.cap_proj.fc2.weight": (2048, 2048),
        **{f"backbone.layers.{i}.{name}": shape for i in range(48) for name, shape in layer.items()},
        "backbone.norm_f.weight": (2048,),
        "projector.projector.0.weight": (8704, 2176),
        "projector.projector.0.bias": (8704,),
        "projector.projector.2.weight": (2048, 8704),
        "projector.projector.2.bias": (2048,),
        "projector.projector.4.weight": (2048, 2048),
        "projector.projector.4.bias": (2048,),
    }
    assert {name: tuple(tensor.shape) for name, tensor in full.state_dict().items()} == official
    assert len(official) == 645 - 2  # the official file stores both tied heads as well
    assert count(full) == 1_612_834_304 - 50288 * 2048 - 16384 * 2048
