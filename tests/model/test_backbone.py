"""Three ways through the layers compute one function; rows and tasks do not mix."""

import math

import pytest
import torch

from omnimamba_kernels import native, use_backend
from omnimamba_model import BASE, MMU, T2I, MambaConfig, MambaLM, OmniMamba, cast_matrices

TASK_IDS = [BASE, MMU, T2I, torch.tensor([T2I, BASE, MMU])]


@pytest.fixture(autouse=True, params=[None, "reference"], ids=["chosen", "reference"])
def backend(request):
    """Each test runs on the kernels this machine chooses and on the definitions."""
    with use_backend(request.param):
        yield


def embeddings(model, length: int) -> torch.Tensor:
    return torch.randn(3, length, model.config.backbone.d_model, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def by_steps(backbone, x, task, prefilled: int):
    """Hidden states from the last prefilled position on: prefill, then one token after another."""
    state = backbone.new_state(x.shape[0])
    hidden = [backbone.prefill(x[:, :prefilled], state, task)]
    step = backbone.bind_step(state, task)
    hidden += [step(x[:, t]) for t in range(prefilled, x.shape[1])]
    return torch.stack(hidden, dim=1), state


@pytest.mark.parametrize("task", TASK_IDS, ids=["base", "mmu", "t2i", "mixed"])
@pytest.mark.parametrize("prefilled", [1, 2, 19])
@torch.no_grad()
def test_steps_equal_scan(model, task, prefilled):
    x = embeddings(model, 22)
    whole = model.backbone(x, task)
    stepped, state = by_steps(model.backbone, x, task, prefilled)
    torch.testing.assert_close(stepped, whole[:, prefilled - 1 :], rtol=1e-4, atol=1e-5)
    assert state.position == 22


@torch.no_grad()
def test_a_prefill_continues_from_a_state(model):
    x = embeddings(model, 22)
    state = model.backbone.new_state(3)
    for piece in x.split([2, 17, 3], dim=1):
        last = model.backbone.prefill(piece, state, MMU)
    torch.testing.assert_close(last, model.backbone(x, MMU)[:, -1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rows_of_a_batch_are_independent(model):
    x = embeddings(model, 18)
    whole = model.backbone(x, T2I)
    other = x.clone()
    other[0] += 1
    torch.testing.assert_close(model.backbone(other, T2I)[1:], whole[1:], rtol=0, atol=0)
    torch.testing.assert_close(model.backbone(x[1:2], T2I), whole[1:2], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_mixed_tasks_equal_each_alone(model):
    x, tasks = embeddings(model, 18), torch.tensor([T2I, BASE, MMU])
    mixed = model.backbone(x, tasks)
    for row, task in enumerate(tasks.tolist()):
        torch.testing.assert_close(mixed[row], model.backbone(x[row : row + 1], task)[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixed[0], model.backbone(x, MMU)[0], atol=1e-3), (
        "the adapters must differ to be told apart"
    )


@pytest.mark.parametrize("task", [BASE, MMU, T2I])
@torch.no_grad()
def test_a_projection_is_base_plus_scaled_adapter(model, task):
    in_proj = model.backbone.layers[1].mixer.in_proj
    x = embeddings(model, 5)
    expected = x @ in_proj.weight.T
    if task != BASE:
        down, up = in_proj.adapter(task)
        expected += model.config.lora_alpha / model.config.lora_rank * (x @ down.T @ up.T)
    torch.testing.assert_close(in_proj(x, task), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_fresh_adapter_is_the_base(config):
    model = OmniMamba(config)
    x = embeddings(model.eval(), 9)
    for task in (MMU, T2I):
        torch.testing.assert_close(model.backbone(x, task), model.backbone(x, BASE), rtol=1e-5, atol=1e-6)


def test_adapter_dropout_is_for_the_adapter_alone(model):
    in_proj = model.backbone.layers[0].mixer.in_proj.train()
    x = torch.randn(3, 400, 32)
    expected = {task: in_proj.eval()(x, task) for task in (BASE, MMU, T2I)}
    in_proj.train().dropout = 0.5
    assert torch.equal(in_proj(x, BASE), expected[BASE])
    for task in (T2I, torch.tensor([T2I, MMU, BASE])):
        out = in_proj(x, task)
        target = torch.stack([expected[int(t)][i] for i, t in enumerate(torch.as_tensor(task).expand(3))])
        update, wanted = out - expected[BASE], target - expected[BASE]
        assert not torch.allclose(update, wanted)
        slope = (update * wanted).sum() / (wanted * wanted).sum()
        assert abs(slope - 1) < 0.1, "on average dropout must keep the adapter's part"


@torch.no_grad()
def test_state_does_not_grow(model):
    x = embeddings(model, 40)
    _, short = by_steps(model.backbone, x[:, :4], MMU, 2)
    _, long = by_steps(model.backbone, x, MMU, 2)
    assert short.nbytes == long.nbytes
    state = model.backbone.new_state(3)
    places = state.conv.data_ptr(), state.ssm.data_ptr()
    model.backbone.prefill(x, state)
    model.backbone.bind_step(state)(x[:, 0])
    assert (state.conv.data_ptr(), state.ssm.data_ptr()) == places
    assert state.ssm.dtype == torch.float32 and state.ssm.abs().sum() > 0


@torch.no_grad()
def test_a_step_leaves_its_input_alone(model):
    x = embeddings(model, 1)[:, 0]
    before = x.clone()
    model.backbone.bind_step(model.backbone.new_state(3))(x)
    assert torch.equal(x, before)


@pytest.mark.skipif(native.why_not() is not None, reason="only native kernels are recorded")
@pytest.mark.parametrize("task", [BASE, MMU, torch.tensor([T2I, MMU, BASE])], ids=["base", "one", "mixed"])
@torch.no_grad()
def test_a_bound_native_step_runs_without_calling_its_kernels_one_by_one(model, task, monkeypatch):
    x = embeddings(model, 1)[:, 0]
    with use_backend("reference"):
        want = model.backbone.bind_step(model.backbone.new_state(3), task)(x)
    with use_backend("native"):
        step = model.backbone.bind_step(model.backbone.new_state(3), task)
    monkeypatch.delattr(native, "call")
    torch.testing.assert_close(step(x), want, rtol=1e-4, atol=1e-4)


def test_initial_steps_and_decays_follow_mamba2():
    torch.manual_seed(0)
    mixer = MambaLM(MambaConfig(d_model=4096, n_layer=1, vocab_size=8, headdim=1, d_state=4)).backbone.layers[0].mixer
    dt, decay = torch.nn.functional.softplus(mixer.dt_bias), -mixer.decay()
    assert 1e-3 * 0.99 <= dt.min() < 1.1e-3 and 0.09 < dt.max() <= 0.101
    assert abs(dt.log().mean() - math.log(1e-2)) < 0.1
    assert 1 <= decay.min() < 1.1 and 15.9 < decay.max() <= 16.01 and abs(decay.mean() - 8.5) < 0.3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_matrices_in_16_bits(lm, dtype):
    ids = torch.randint(64, (2, 21), generator=torch.Generator().manual_seed(5))
    exact = lm(ids)
    cast_matrices(lm, dtype)
    mixer = lm.backbone.layers[0].mixer
    assert mixer.out_proj.weight.dtype == dtype and mixer.A_log.dtype == torch.float32
    logits = lm(ids)
    assert logits.dtype == torch.float32, "on a CPU only the weights are narrow"
    assert (logits.float() - exact).norm() < 0.05 * exact.norm()
    stepped, state = by_steps(lm.backbone, lm.backbone.embedding(ids), BASE, 6)
    assert (lm.head(stepped).float() - exact[:, 5:]).norm() < 0.05 * exact.norm()
    assert state.ssm.dtype == torch.float32


@torch.no_grad()
def test_fp64_agrees_with_fp32_and_stays_fp64(lm):
    ids = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(6))
    with use_backend("reference"):
        single, double = lm(ids), lm.double()(ids)
    assert double.dtype == torch.float64
    assert 1e-9 < (single - double).norm() / double.norm() < 1e-5, "the same function, computed more exactly"
