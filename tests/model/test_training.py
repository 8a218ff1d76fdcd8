import copy
import dataclasses

import pytest
import torch

from omnimamba_model import OmniMamba
from omnimamba_model.omnimamba import IGNORE
from omnimamba_model.training import Phase, Trainer, train


def phase(stage: str = "joint", lessons: tuple[str, ...] = ("t2i", "mmu"), steps: int = 3, **options) -> Phase:
    return Phase("a phase", stage, lessons, steps, learning_rate=1e-2, warmup=2, **options)


@pytest.fixture
def lessons(caption, image, features, text):
    return {
        "sentences": lambda place: ("text", {"ids": text[:, :-1], "labels": text[:, 1:]}),
        "images": lambda place: ("t2i", {"caption": caption, "image": image}),
        "t2i": lambda place: ("t2i", {"caption": caption, "image": image}),
        "mmu": lambda place: ("mmu", {"features": features, "text": text, "labels": text}),
    }


@pytest.mark.parametrize(
    ("stage", "taught"),
    [("base", ("sentences", "images")), ("mmu", ("mmu",)), ("t2i", ("t2i",)), ("joint", ("t2i", "mmu"))],
)
def test_what_a_phase_does_not_train_stays_bit_for_bit(model, lessons, stage, taught):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learns = set(model.train_only(stage))
    train(model, phase(stage, taught, weight_decay=0.3), lessons, report=lambda losses: None)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    not_met = {"backbone.mmu_pos_embed"} if stage == "base" else set()
    assert changed == learns - not_met
    assert not model.training and all(p.requires_grad for p in model.parameters())


def test_every_step_is_reported_and_losses_fall(model, lessons):
    seen = []
    train(model, phase(steps=20), lessons, report=seen.append)
    assert len(seen) == 20 and set(seen[0]) == {"t2i", "mmu"}
    assert sum(seen[-1].values()) < 0.8 * sum(seen[0].values())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_tokens_are_counted_without_their_padding(model, lessons, accumulate):
    """Captions of 3, 4 and 5 words before 9 image tokens each; texts of 5, 7 and 7 after 6 features; 4 frame tokens."""
    trainer = Trainer(model, phase(accumulate=accumulate), lessons)
    for _ in range(2):
        trainer.step()
        assert trainer.tokens == accumulate * (12 + 19 + 3 * (9 + 4) + 3 * (6 + 4))
    text = lessons["sentences"](0)[1]
    text["labels"] = text["labels"].masked_fill(text["labels"] == model.config.tokens.pad, IGNORE)
    trainer = Trainer(
        model, phase("base", ("sentences",), accumulate=accumulate), {"sentences": lambda _: ("text", text)}
    )
    trainer.step()
    assert trainer.tokens == accumulate * (19 - 3)


def test_decay_shrinks_matrices_only(model, lessons):
    parameters = dict(model.named_parameters())
    matrix, vector = (parameters[f"backbone.layers.0.mixer.{name}"] for name in ("out_proj.weight", "dt_bias"))
    sizes = [(matrix.norm().item(), vector.norm().item())]
    for decay in (0.0, 50.0):
        train(model, phase(steps=1, weight_decay=decay), lessons, report=lambda losses: None)
        sizes.append((matrix.norm().item(), vector.norm().item()))
    assert sizes[2][0] < 0.9 * sizes[1][0]
    assert sizes[2][1] > 0.99 * sizes[1][1]


@pytest.mark.parametrize("clip", [1e9, 0.05])
def test_gradients_together_are_cut_to_a_norm(model, lessons, monkeypatch, clip):
    """Each by the same factor, and only where their norm is larger; what is told is the norm before."""
    whole, seen = Trainer(copy.deepcopy(model), phase(clip=1e9), lessons, seed=1), {}
    whole.learn()
    before = {name: p.grad for name, p in whole.model.named_parameters() if p.grad is not None}
    norm = sum(gradient.double().square().sum() for gradient in before.values()).sqrt().item()
    trainer = Trainer(model, phase(clip=clip), lessons, seed=1)
    step = trainer.optimizer.step

    def noting():
        seen.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        step()

    monkeypatch.setattr(trainer.optimizer, "step", noting)
    trainer.step()
    assert norm > 0.1 and trainer.norm == pytest.approx(norm, rel=1e-4) and seen.keys() == before.keys()
    for name, gradient in before.items():
        torch.testing.assert_close(seen[name], gradient * min(1.0, clip / norm), rtol=1e-4, atol=1e-9)


def test_dropout_is_a_function_of_seed_step_and_lesson(config, lessons):
    def learn(seed, noise):
        torch.manual_seed(0)
        model = OmniMamba(dataclasses.replace(config, lora_dropout=0.5))
        trainer = Trainer(model, phase(), lessons, seed=seed)
        torch.manual_seed(noise)
        before, seen = torch.get_rng_state(), [trainer.step() for _ in range(3)]
        assert torch.equal(torch.get_rng_state(), before)
        return seen

    assert learn(1, 5) == learn(1, 6) != learn(2, 5)


def test_the_rate_warms_up_and_falls_to_a_hundredth():
    long = Phase("", "joint", ("t2i",), steps=1000, learning_rate=2.0, warmup=100)
    assert long.rate(0) == pytest.approx(0.02, rel=1e-3)
    assert max(map(long.rate, range(1000))) == pytest.approx(2.0, rel=0.05)
    assert long.rate(500) == pytest.approx(1.01, rel=1e-3)
    assert long.rate(999) == pytest.approx(0.02, rel=1e-2)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(model, lessons, where):
    trainer = Trainer(model, phase(), lessons)
    trainer.step()
    assert 0 < trainer.norm < float("inf")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = [t.clone() for state in trainer.optimizer.state.values() for t in state.values()]
    if where == "loss":
        trainer.lessons["mmu"] = lambda place: (
            "mmu", lessons["mmu"](place)[1] | {"features": torch.full((3, 6, 12), float("nan"))}
        )  # fmt: skip
    else:
        model.backbone.norm_f.weight.register_hook(lambda gradient: gradient * float("inf"))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="step 2 is not finite: gradient norm (nan|inf), losses .*'mmu'"):
            trainer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters()) and trainer.done == 1
    after = [t for state in trainer.optimizer.state.values() for t in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
