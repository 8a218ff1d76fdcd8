"""The published image tokenizer: its size, its tensors' names, and its arithmetic against another implementation."""

import pytest
import torch

from omnimamba_model.vq16 import VQ16, VQConfig

SMALL = VQConfig(codebook_size=50, channels=32, z_channels=16)


@pytest.fixture
def tokenizer() -> VQ16:
    torch.manual_seed(0)
    return VQ16(SMALL).eval()


def test_full_size_and_names():
    with torch.device("meta"):
        full = VQ16()
    assert sum(p.numel() for p in full.parameters()) == 71_883_403
    shapes = {name: tuple(t.shape) for name, t in full.state_dict().items()}
    for name, shape in {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.conv_blocks.0.downsample.conv.weight": (128, 128, 3, 3),
        "encoder.conv_blocks.2.res.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.conv_blocks.4.attn.1.proj_out.weight": (512, 512, 1, 1),
        "encoder.mid.1.q.bias": (512,),
        "encoder.conv_out.weight": (256, 512, 3, 3),
        "decoder.conv_blocks.0.upsample.conv.weight": (512, 512, 3, 3),
        "decoder.conv_blocks.0.attn.2.norm.weight": (512,),
        "decoder.conv_blocks.4.res.2.conv2.weight": (128, 128, 3, 3),
        "quantize.embedding.weight": (16384, 8),
        "quant_conv.weight": (8, 256, 1, 1),
        "post_quant_conv.weight": (256, 8, 1, 1),
    }.items():
        assert shapes[name] == shape, name


def janus_name(name: str) -> str:
    """What transformers' Janus calls a tensor of ours; it stores the same network."""
    side, _, rest = name.partition(".")
    for i, part in enumerate(("block_1", "attn_1", "block_2")):
        rest = rest.replace(f"mid.{i}.", f"mid.{part}.")
    kind = "down" if side == "encoder" else "up"
    return f"{side}.{rest}".replace("conv_blocks", kind).replace(".res.", ".block.")


def test_same_numbers_as_another_implementation(tokenizer):
    modeling = pytest.importorskip("transformers.models.janus.modeling_janus")
    sizes = dict(num_embeddings=SMALL.codebook_size, base_channels=SMALL.channels, latent_channels=SMALL.z_channels)
    config = modeling.JanusVQVAEConfig(**sizes, num_patches=2)
    other = modeling.JanusVQVAE(config).eval()
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter.normal_(std=0.2)
    wanted = other.state_dict().keys()
    other.load_state_dict({n if n in wanted else janus_name(n): t for n, t in tokenizer.state_dict().items()})
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(tokenizer.encoder(images), other.encoder(images))
        tokens = tokenizer.encode(images)
        torch.testing.assert_close(tokenizer.decode(tokens), other.decode(tokens.flatten(1)))


def test_tokens_name_the_nearest_direction(tokenizer):
    """Lengths do not count, neither a vector's nor a codebook row's."""
    table = tokenizer.quantize.embedding.weight.detach()
    wanted = torch.tensor([[[3, 49], [0, 7]]])
    scaled = table[wanted] * torch.tensor([0.01, 50.0])[:, None]
    with torch.no_grad():
        tokenizer.quantize.embedding.weight[7] *= 100
    assert torch.equal(tokenizer.quantize.nearest(scaled.permute(0, 3, 1, 2)), wanted)
    torch.testing.assert_close(tokenizer.quantize(wanted).norm(dim=1), torch.ones(1, 2, 2))


def test_an_empty_batch(tokenizer):
    with torch.no_grad():
        assert tokenizer.encode(torch.zeros(0, 3, 32, 16)).shape == (0, 2, 1)
        assert tokenizer.decode(torch.zeros(0, 2, 1, dtype=torch.long)).shape == (0, 3, 32, 16)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 3, 30, 32)])
def test_unfit_images_are_refused(tokenizer, shape):
    with pytest.raises(ValueError, match="multiples of 16"):
        tokenizer.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"\(b, h, w\)"):
        tokenizer.decode(torch.zeros(1, 4, dtype=torch.long))
