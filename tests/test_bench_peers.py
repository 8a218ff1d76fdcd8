"""Peers that are put together here, from transformers' functions and from torch's: right, and timed beside ours."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench").is_dir():
    pytest.skip("the benchmarks are not here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import (  # noqa: E402
    bench_causal_conv1d,
    bench_generation,
    bench_lora_linear,
    bench_mamba_mixer,
    generators,
    inputs,
    peers,
    plain,
    rates,
)
from bench.baselines.transformer import Transformer  # noqa: E402
from bench.measure import Contender  # noqa: E402
from omnimamba_kernels import lora_linear, use_backend  # noqa: E402
from omnimamba_model import MambaConfig, MambaLM  # noqa: E402


class Checks:
    """A Bench that runs the checks alone: name to (error, bound)."""

    quick = False

    def compare(self, benchmark, group, case, contenders: list[Contender], work, **more) -> list:
        self.case, self.checked = case, {c.name: (c.check(), c.bound) for c in contenders}
        return []


@pytest.fixture
def checks() -> Checks:
    return Checks()


def right(found: dict[str, tuple[float, float]], *names: str) -> None:
    assert set(names) <= found.keys()
    assert all(error <= bound for error, bound in found.values()), found


@pytest.mark.skipif(isinstance(peers.mamba2(), str), reason="transformers 5.23 is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_transformers_mixer_computes_what_ours_does(checks, dtype):
    bench_mamba_mixer.test_sequence(checks, None, 1, 300, 2, dtype)
    right(checks.checked, peers.label(), bench_mamba_mixer.inputs.own_backends()[0])
    if dtype != torch.float16:
        bench_mamba_mixer.test_training(checks, None, dtype, 1, 300, 2)
        right(checks.checked, peers.label())
        bench_mamba_mixer.test_step(checks, None, 3, 2, dtype)
        right(checks.checked, peers.label(), *bench_mamba_mixer.inputs.own_backends())


@pytest.mark.skipif(isinstance(peers.mamba2(), str), reason="transformers 5.23 is not installed")
def test_a_mixer_that_forgets_its_gate_is_found_out(checks, monkeypatch):
    monkeypatch.setattr(peers, "_norms", lambda eps: lambda y, z, weight, groups: y * weight)
    for test in (bench_mamba_mixer.test_sequence, bench_mamba_mixer.test_step):
        test(checks, None, *((1, 300) if test is bench_mamba_mixer.test_sequence else (3,)), 2, torch.float32)
        error, bound = checks.checked[peers.label()]
        assert error > bound


@pytest.mark.parametrize(("row", "position"), [(0, 0), (-1, -1)])
def test_a_mixer_that_is_wrong_at_one_end_is_found_out(checks, row, position, monkeypatch):
    """At the first row's beginning, and at the last one's end."""
    whole = bench_mamba_mixer.mamba_split_conv1d_scan_combined

    def wrong(zxbcdt, *rest, **named):
        y = whole(zxbcdt, *rest, **named)
        kept = torch.ones_like(y)
        kept[row, position] = 0 if y.dtype == torch.float32 else 1
        return y * kept

    for test, size in ((bench_mamba_mixer.test_sequence, (2, 300, 2)), (bench_mamba_mixer.test_training, (2, 300, 2))):
        arguments = (*size, torch.float32) if test is bench_mamba_mixer.test_sequence else (torch.float32, *size)
        for function, passes in ((whole, True), (wrong, False)):
            monkeypatch.setattr(bench_mamba_mixer, "mamba_split_conv1d_scan_combined", function)
            test(checks, None, *arguments)
            error, bound = checks.checked[bench_mamba_mixer.inputs.own_backends()[0]]
            assert (error <= bound) == passes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_the_convolution_in_plain_torch(checks, dtype):
    bench_causal_conv1d.test_update(checks, None, 2, dtype)
    right(checks.checked, plain.EAGER)


def test_rows_of_16_bits_meet_weights_of_16_bits(checks, monkeypatch):
    """Ours is called with both, and torch too."""
    seen = set()

    def noting(x, weight, *rest, **named):
        seen.add((named["backend"], x.dtype, weight.dtype))
        return lora_linear(x, weight, *rest, **named)

    for name, small in (("IN", 64), ("OUT", 48)):
        monkeypatch.setattr(bench_lora_linear, name, small)
    monkeypatch.setattr(bench_lora_linear, "lora_linear", noting)
    monkeypatch.setattr(peers, "too_slow", lambda *_: None)
    bench_lora_linear.test_forward_of_16_bits(checks, None, 70, torch.bfloat16)
    right(checks.checked, plain.EAGER)
    assert checks.case == "70 x 64 to 48, bf16 weights and activations"
    assert all((name, *2 * [torch.bfloat16]) in seen for name in bench_mamba_mixer.inputs.own_backends())
    rows = {(case[0], case[1]) for case in map(values, bench_lora_linear.CASES)} & set(bench_lora_linear.NARROW)
    assert rows == {(512, torch.bfloat16), (2048, torch.bfloat16)}


def values(case) -> tuple:
    return getattr(case, "values", case)


@pytest.mark.parametrize(("dtype", "rate"), [("float32", 1e6), ("bfloat16", 3e6)])
def test_a_length_without_a_cache_that_is_not_run_says_why(dtype, rate, monkeypatch):
    """At the matrix rate of the dtype that it would run in."""
    small, known = Transformer(128, 2, 64, 50), {torch.float32: 1e6, torch.bfloat16: 3e6}
    monkeypatch.setattr(generators, "model", lambda who, dtype: small)
    monkeypatch.setattr(bench_generation, "dtype_of", lambda who, context: dtype)
    monkeypatch.setattr(rates, "torch_matmul_rate", lambda dtype, rows: known[dtype])

    class Rates:
        sample = staticmethod(lambda kind: {"sgemm": 1e6, "bf16 gemm": 3e6}[kind])

    class Bench:
        rates = Rates

    said = bench_generation.too_long(Bench, 32768)
    assert said.startswith("the 3 steps of a round would take ") and said.endswith(" days")
    days = float(said.split()[-2])
    exact = sum(bench_generation.pass_flops(n + 1) for n in range(0, 32768, 512)) * 512 / rate / 86400
    assert days == pytest.approx(exact, rel=0.1)


@torch.inference_mode()
def test_a_definition_takes_short_chunks_and_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model, ids = MambaLM(MambaConfig(d_model=32, n_layer=2, vocab_size=90, d_state=16, headdim=16)), torch.arange(90)
    with use_backend("reference"):
        long = model(ids[None])
    with inputs.by_definition(model):
        assert model.backbone.layers[1].mixer.config.chunk_size == inputs.CHUNK == 64
        found = model(ids[None])
        with use_backend("reference"):
            assert torch.equal(model(ids[None]), found)
    assert not torch.equal(found, long) and torch.allclose(found, long, rtol=1e-4, atol=1e-5)
    with pytest.raises(KeyError), inputs.by_definition(model):
        raise KeyError
    assert model.backbone.layers[1].mixer.config == model.backbone.config == MambaConfig(
        d_model=32, n_layer=2, vocab_size=90, d_state=16, headdim=16
    )  # fmt: skip
