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
        (dict(d_model=0), r"d_model must be a whole number in 1\.\.2147483648, got 0"),
        (dict(headdim=48), "multiple of headdim, got headdim 48"),
        (dict(ngroups=3), "multiple of ngroups, got 3"),
        (dict(d_conv=5), "d_conv must be 2, 3 or 4, got 5"),
        (dict(n_layer=True), "n_layer must be a whole number in .*, got True"),
        (dict(n_layer=10**6), "n_layer must be at most 4096, got 1000000"),
        (dict(vocab_size=2**40), "vocab_size must be a whole number"),
        (dict(d_model=2**31), r"expand \* d_model .* must be at most 2147483648"),
        (dict(norm_eps=float("inf")), "norm_eps must be a positive number"),
        (dict(norm_eps=None), "norm_eps must be a positive number"),
        (dict(dropout=False), "dropout must lie in"),
        (dict(dropout=float("nan")), "dropout must lie in"),
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
        (dict(text_slots=-1), "text_slots must be a whole number"),
        (dict(lora_dropout="high"), "lora_dropout must lie in"),
        (dict(image_tokens=9.0), "image_tokens must be a whole number in .*, got 9.0"),
        (dict(lora_alpha=float("nan")), "lora_alpha must be a positive number of at most 2147483648, got nan"),
        (dict(lora_alpha=10**400), "lora_alpha must be a positive number"),
        (dict(lora_alpha="8"), "lora_alpha must be a positive number"),
        (dict(feature_dim=2**31), r"mlp_ratio \* feature_dim must be at most"),
    ],
)
def test_omnimamba_sizes_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        OmniMambaConfig.preset("tiny", **changes)


@pytest.mark.parametrize("wrong", [1.0, "1", True, None])
def test_special_tokens_are_whole_numbers(wrong):
    with pytest.raises(ValueError, match="SpecialTokens.soi must be a whole number"):
        SpecialTokens(soi=wrong)


def test_parts_must_be_objects():
    for name, kind in (("backbone", "MambaConfig"), ("tokens", "SpecialTokens")):
        with pytest.raises(ValueError, match=f"{kind} must be an object of fields, got"):
            OmniMambaConfig.from_dict({name: [[]]})


def test_unknown_names_are_named():
    with pytest.raises(ValueError, match="no preset is called '7b'; there are tiny, 130m"):
        MambaConfig.preset("7b")
    with pytest.raises(ValueError, match="MambaConfig has no field d_modle"):
        MambaConfig.from_dict({"d_modle": 3})
