"""GGUF files, read back byte by byte as the format says; and what cannot become one."""

from __future__ import annotations

import math
import struct

import pytest
import torch

from omnimamba_model import MambaConfig, MambaLM, cli, save
from omnimamba_model.gguf import ALIGNMENT, q8_0, save_gguf

TYPES = {0: "float32", 8: "q8_0", 30: "bfloat16"}


class Reader:
    """The facts and the tensors of a file, as its own numbers place them."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.at = raw, 4
        assert raw[:4] == b"GGUF" and self.take("I") == 3
        tensors, facts = self.take("Q"), self.take("Q")
        self.facts = {self.text(): self.value() for _ in range(facts)}
        found = [self.entry() for _ in range(tensors)]
        self.data = -(-self.at // ALIGNMENT) * ALIGNMENT
        self.tensors = {name: (kind, self.tensor(sizes, kind, offset)) for name, sizes, kind, offset in found}

    def take(self, kind: str):
        (value,) = struct.unpack_from("<" + kind, self.raw, self.at)
        self.at += struct.calcsize("<" + kind)
        return value

    def text(self) -> str:
        count = self.take("Q")
        self.at += count
        return self.raw[self.at - count : self.at].decode()

    def value(self):
        kind = self.take("I")
        return self.text() if kind == 8 else self.take({4: "I", 6: "f"}[kind])

    def entry(self):
        name = self.text()
        sizes = [self.take("Q") for _ in range(self.take("I"))]
        return name, sizes, TYPES[self.take("I")], self.take("Q")

    def tensor(self, sizes, kind, offset) -> torch.Tensor:
        assert offset % ALIGNMENT == 0
        count, begin = math.prod(sizes), self.data + offset
        if kind == "q8_0":
            blocks = torch.tensor(list(self.raw[begin : begin + count // 32 * 34]), dtype=torch.uint8).view(-1, 34)
            scale = blocks[:, :2].contiguous().view(torch.float16).float()
            return (scale * blocks[:, 2:].contiguous().view(torch.int8)).view(sizes[::-1])
        dtype = getattr(torch, kind)
        size = torch.empty((), dtype=dtype).element_size()
        buffer = bytearray(self.raw[begin : begin + count * size])
        return torch.frombuffer(buffer, dtype=dtype).float().view(sizes[::-1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "q8_0"])
def test_every_tensor_is_read_back(lm, tmp_path, dtype):
    save_gguf(lm, tmp_path / "a.gguf", dtype)
    config, weights = lm.config, dict(lm.backbone.named_parameters())
    found = Reader((tmp_path / "a.gguf").read_bytes())
    assert found.facts["general.architecture"] == "mamba2" and found.facts["tokenizer.ggml.model"] == "no_vocab"
    named = {k.split(".", 1)[1]: v for k, v in found.facts.items() if k.startswith("mamba2.ssm.")}
    assert named == {
        "ssm.conv_kernel": config.d_conv, "ssm.inner_size": config.d_inner, "ssm.state_size": config.d_state,
        "ssm.time_step_rank": config.nheads, "ssm.group_count": config.ngroups,
    }  # fmt: skip
    assert found.facts["mamba2.vocab_size"] == config.vocab_size and len(found.tensors) == len(weights)
    theirs = {"embedding": "token_embd", "norm_f": "output_norm", "norm": "attn_norm", "mixer.in_proj": "ssm_in",
              "mixer.conv1d": "ssm_conv1d", "mixer.dt_bias": "ssm_dt.bias", "mixer.A_log": "ssm_a",
              "mixer.D": "ssm_d", "mixer.norm": "ssm_norm", "mixer.out_proj": "ssm_out"}  # fmt: skip
    for name, weight in weights.items():
        place, _, last = name.removeprefix("layers.").rpartition(".")
        layer, _, short = place.partition(".") if name.startswith("layers.") else ("", "", place)
        short, last = (f"{short}.{last}", "") if short == "mixer" else (short, f".{last}")
        kind, got = found.tensors[(f"blk.{layer}." if layer else "") + theirs[short] + last]
        want = -weight.exp() if "A_log" in name else weight
        assert kind == (dtype if weight.ndim == 2 else "float32")
        error = {"float32": 0.0, "bfloat16": 2**-8, "q8_0": 0.5 / 127 + 2**-11}[kind] * weight.abs().max()
        assert ((got.reshape(want.shape) - want).abs() <= error).all(), name
    assert found.tensors["blk.0.ssm_norm.weight"][1].shape == (config.ngroups, config.d_inner // config.ngroups)
    assert found.tensors["blk.0.ssm_a"][1].shape == (config.nheads, 1)


def test_q8_0_blocks():
    values = torch.zeros(2, 64)
    values[0, 3], values[0, 5], values[1, 40] = 127.0, -1.0, -0.5
    blocks = q8_0(values)
    assert blocks.shape == (4, 34)
    assert blocks[:, :2].contiguous().view(torch.float16).flatten().tolist() == pytest.approx(
        [1, 0, 0, 0.5 / 127], 1e-3
    )
    numbers = blocks[:, 2:].contiguous().view(torch.int8)
    assert (numbers[0, 3], numbers[0, 5], numbers[3, 8]) == (127, -1, -127) and not numbers[1:3].any()


def test_convert_writes_it_and_says_what_cannot(lm, model, tmp_path, capsys):
    save(lm, tmp_path / "lm")
    save(model, tmp_path / "omni")
    out = tmp_path / "lm.gguf"
    assert cli.main(["convert", str(tmp_path / "lm"), str(out), "--dtype", "q8_0"]) == 0
    assert Reader(out.read_bytes()).tensors["token_embd.weight"][0] == "q8_0"
    for source, target, more, said in (
        ("omni", "o.gguf", [], "OmniMamba"),
        ("lm", "folder", ["--dtype", "q8_0"], "gguf"),
        ("lm", "p.gguf", ["--as-omnimamba"], "--dtype"),
    ):
        assert cli.main(["convert", str(tmp_path / source), str(tmp_path / target), *more]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / target).exists()


def test_rows_that_q8_0_cannot_cut(tmp_path):
    narrow = MambaLM(MambaConfig.preset("tiny", d_model=24))
    with pytest.raises(ValueError, match="multiple of 32"):
        save_gguf(narrow, tmp_path / "a.gguf", "q8_0")
    assert not list(tmp_path.iterdir())
