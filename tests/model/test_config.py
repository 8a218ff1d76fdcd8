import json

import pytest

from omnimamba_model import MambaConfig, OmniMambaConfig, SpecialTokens


def test_full_size_matches_the_published_model():
    config = OmniMambaConfig.preset("1.3b")
    size = config.backbone
    assert (size.d_inner, size.nheads, size.conv_dim, size.in_proj_dim) == (4096, 64, 4352, 8512)
    assert (config.t2i_prompt, config.t2i_positions, config.lora_scale) == (72, 329, 4.0)


def test_survives_json():
    config = OmniMambaConfig.preset("tiny", image_tokens=16)
    assert OmniMambaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.image_tokens == 16


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(d_model=0), "d_model must be a positive number, got 0"),
        (dict(headdim=48), "multiple of headdim, got headdim 48"),
        (dict(ngroups=3), "multiple of ngroups, got 3"),
        (dict(d_conv=5), "d_conv must be 2, 3 or 4, got 5"),
        (dict(dropout=1.0), r"dropout must lie in \[0, 1\), got 1.0"),
    ],
)
def test_backbone_sizes_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        MambaConfig.preset("tiny", **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(tokens=SpecialTokens()), r"special tokens must lie in 0\.\.63, got .*'pad': 50277"),
        (dict(tokens=SpecialTokens(0, 1, 2, 3, 4, 5, 6, 6)), "special tokens must have different ids"),
        (dict(mmu_positions=9), "mmu_positions must cover the 6 features"),
        (dict(text_slots=-1), "text_slots must be a positive number"),
        (dict(lora_dropout="high"), "lora_dropout must lie in"),
    ],
)
def test_omnimamba_sizes_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        OmniMambaConfig.preset("tiny", **changes)


def test_unknown_names_are_named():
    with pytest.raises(ValueError, match="no preset is called '7b'; there are tiny, 130m"):
        MambaConfig.preset("7b")
    with pytest.raises(ValueError, match="MambaConfig has no field d_modle"):
        MambaConfig.from_dict({"d_modle": 3})
