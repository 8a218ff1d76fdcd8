import pytest
import torch

from omnimamba_model import GREEDY, Sampling, answer, cast_matrices, draw, generate_text
from omnimamba_model.generation import drawing_rows
from omnimamba_model.sampling import probabilities, sample

LOGITS = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05], [0.05, 0.1, 0.15, 0.2, 0.5]]).log()


@torch.no_grad()
def test_greedy_text_equals_repeated_full_forward(lm):
    ids = torch.randint(64, (2, 5), generator=torch.Generator().manual_seed(0))
    grown = ids
    for _ in range(12):
        grown = torch.cat([grown, lm(grown)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generate_text(lm, ids, 12), grown[:, 5:])


@torch.no_grad()
def test_greedy_drawing_equals_repeated_full_forward(model, caption, config):
    image = torch.zeros(3, config.image_tokens, dtype=torch.long)
    for i in range(config.image_tokens):
        image[:, i] = model.t2i(caption, image).logits[:, i].argmax(-1)
    assert torch.equal(draw(model, caption), image)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_exact_drawings_never_see_the_padding(model, caption, config, guidance):
    """The prompt's own tokens at their own places, and no others; mixed lengths in one batch."""
    kept = [torch.cat([torch.ones(2), row != config.tokens.pad, torch.ones(2)]).bool() for row in caption]
    assert len({int(row.sum()) for row in kept}) == 3
    opening, empty = model.t2i_opening(caption), model.t2i_opening(torch.full_like(caption[:1], config.tokens.pad))
    found = draw(model, caption, guidance=guidance, exact=True)
    for i, row in enumerate(found):
        for step in range(config.image_tokens):
            logits = []
            for prompt in (opening[i, kept[i]], empty[0, [0, 1, -2, -1]]):
                drawn = model.backbone.embed_image(row[None, :step], config.t2i_prompt)
                hidden = model.backbone(torch.cat([prompt[None], drawn], dim=1), 1)
                logits.append(model.image_head(hidden[0, -1]))
            assert row[step] == (logits[1] + guidance * (logits[0] - logits[1])).argmax()
    assert torch.equal(found[2], draw(model, caption, guidance=1.0)[2]) or guidance != 1.0  # it has no padding
    rows = drawing_rows(model, caption, exact=True)
    assert [len(row.prompt) for row in rows] == [int(row.sum()) for row in kept]


@torch.no_grad()
def test_greedy_answer_equals_repeated_full_forward(model, features, text):
    question, steps = text[:, :4], 6
    grown = torch.cat([question, torch.zeros(3, steps, dtype=torch.long)], dim=1)
    for i in range(4, 4 + steps):
        grown[:, i] = model.mmu(features, grown).logits[:, i].argmax(-1)
    assert torch.equal(answer(model, features, question, steps, stop=63), grown[:, 4:])


@torch.no_grad()
def test_answers_past_the_last_place_keep_its_vector(model, features, text):
    """As in the whole pass, which holds more than ``mmu_positions``."""
    question, places = text[1:2, :3], model.backbone.mmu_pos_embed.shape[1]
    model.backbone.mmu_pos_embed[0, -1] *= 30  # so that it is heard
    first, steps = model.mmu_opening(features[:1]).shape[1] + 3, places + 6
    found = answer(model, features[:1], question, steps - first, stop=[])
    grown = torch.cat([question, found], dim=1)
    assert torch.equal(found, model.mmu(features[:1], grown).logits[:, 3:].argmax(-1))


@torch.no_grad()
def test_guidance_mixes_the_logits_of_asked_and_empty(model, caption, config):
    guidance, empty = 2.5, torch.full_like(caption, config.tokens.pad)
    image = torch.zeros(3, config.image_tokens, dtype=torch.long)
    for i in range(config.image_tokens):
        asked, free = model.t2i(caption, image).logits[:, i], model.t2i(empty, image).logits[:, i]
        image[:, i] = (free + guidance * (asked - free)).argmax(-1)
    assert torch.equal(draw(model, caption, guidance=guidance), image)
    assert not torch.equal(draw(model, caption), image)


def test_stop_ends_a_row_and_then_the_loop(lm):
    ids = torch.randint(64, (2, 5), generator=torch.Generator().manual_seed(0))
    free = generate_text(lm, ids, 12)
    stop = int(free[0, 3])
    ends = [row.index(stop) if stop in row else 11 for row in free.tolist()]
    out = generate_text(lm, ids, 12, stop=stop)
    assert out.shape == (2, max(ends) + 1)
    for row, end in enumerate(ends):
        assert torch.equal(out[row, : end + 1], free[row, : end + 1])
        assert (out[row, end + 1 :] == stop).all()


@torch.no_grad()
def test_both_directions_in_16_bits(model, caption, image, features, text):
    exact = model.t2i(caption, image).logits, model.mmu(features, text).logits
    cast_matrices(model, torch.bfloat16)
    narrow = model.t2i(caption, image).logits, model.mmu(features, text).logits
    for wide, close in zip(exact, narrow, strict=True):
        assert close.dtype == torch.float32 and (close - wide).norm() < 0.05 * wide.norm()
    drawn = draw(model, caption)
    torch.testing.assert_close(drawn[:, 0], narrow[0][:, 0].argmax(-1))
    assert drawn.shape == image.shape
    assert answer(model, features, text[:, :3], 4, stop=63).shape == (3, 4)


def test_a_seed_repeats_and_seeds_differ(model, caption):
    first, again, other = (draw(model, caption, Sampling(seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_seed_leaves_the_global_generator_alone(model, caption):
    before = torch.get_rng_state()
    draw(model, caption, Sampling(seed=3))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "sampling, expected",
    [
        (Sampling(), [0.5, 0.2, 0.15, 0.1, 0.05]),
        (Sampling(temperature=0.5), [0.25 / 0.325, 0.04 / 0.325, 0.0225 / 0.325, 0.01 / 0.325, 0.0025 / 0.325]),
        (Sampling(top_k=2), [0.5 / 0.7, 0.2 / 0.7, 0, 0, 0]),
        (Sampling(top_k=9), [0.5, 0.2, 0.15, 0.1, 0.05]),
        (Sampling(top_p=0.6), [0.5 / 0.7, 0.2 / 0.7, 0, 0, 0]),
        (Sampling(top_p=0.01), [1, 0, 0, 0, 0]),
        (Sampling(top_k=3, top_p=0.6), [0.5 / 0.7, 0.2 / 0.7, 0, 0, 0]),
    ],
)
def test_what_is_drawn_from(sampling, expected):
    expected = torch.tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(probabilities(LOGITS, sampling), torch.stack([expected, expected.flip(0)]))


def test_draws_follow_the_probabilities():
    rows = LOGITS[:1].expand(20_000, -1)
    drawn = sample(rows, Sampling(top_k=3), torch.Generator().manual_seed(0))
    frequency = torch.bincount(drawn, minlength=5) / len(drawn)
    torch.testing.assert_close(frequency, probabilities(LOGITS[:1], Sampling(top_k=3))[0], rtol=0, atol=0.015)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(top_k=1)])
def test_greedy_takes_the_likeliest(sampling):
    tied = torch.tensor([[0.0, 3.0, 3.0]]).expand(50, -1)
    assert sample(LOGITS, sampling).tolist() == [0, 4]
    assert sample(tied, sampling).tolist() == [1] * 50, "of equals the first, every time"


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(temperature=-1), "temperature must be 0"),
        (dict(temperature=float("nan")), "temperature must be 0"),
        (dict(temperature=float("inf")), "temperature must be 0 or more, and finite"),
        (dict(top_p=float("nan")), "top_p must lie"),
        (dict(top_k=-1), "top_k must be a whole number, 0"),
        (dict(top_p=0), "top_p must lie"),
        (dict(seed=2**63), "seed must be a whole number of 64 bits"),
        (dict(seed=0.5), "seed must be a whole number of 64 bits"),
    ],
)
def test_sampling_is_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)


@pytest.mark.parametrize("temperature", [1e-30, 1e-45, 1e-300, 5e-324])
def test_the_coldest_temperatures_take_the_likeliest(temperature):
    sampling = Sampling(temperature)
    wide = torch.tensor([[-1e30, 3.0, 1e30], [0.0, -1e-3, -5.0]])
    assert sample(LOGITS, sampling).tolist() == [0, 4] and sample(wide, sampling).tolist() == [2, 0]
    assert probabilities(wide, sampling).tolist() == [[0, 0, 1], [1, 0, 0]]


def test_ids_are_checked(lm, model, caption, features):
    long = torch.zeros(3, 4, dtype=torch.long)
    for wrong in (long[:, :0], long[0], long[0, 0], long[:0]):
        with pytest.raises(ValueError, match=r"ids must have shape \(b, l\), b at least 1, l at least 1, got"):
            generate_text(lm, wrong, 2)
    with pytest.raises(ValueError, match=r"ids must lie in 0\.\.63, got 0\.\.64"):
        generate_text(lm, torch.tensor([[0, 64]]), 2)
    with pytest.raises(TypeError, match="ids must be int32 or int64, got torch.float32"):
        generate_text(lm, long.float(), 2)
    for wrong in (caption[0], caption[:0], caption[:, :2]):
        with pytest.raises(ValueError, match="caption must have shape"):
            draw(model, wrong)
    with pytest.raises(ValueError, match="question must have shape"):
        answer(model, features, long[0], 2)
    with pytest.raises(ValueError, match="features must have a row a question, 3, got shape"):
        answer(model, features[:2], long, 2)


@pytest.mark.parametrize("guidance", [float("nan"), float("inf"), -float("inf"), 1e39])
def test_guidance_is_finite(model, caption, guidance):
    with pytest.raises(ValueError, match="guidance must be finite"):
        draw(model, caption, guidance=guidance)


def test_steps_are_checked(lm):
    with pytest.raises(ValueError, match="steps must be 1 or more, got 0"):
        generate_text(lm, torch.zeros(1, 2, dtype=torch.long), 0)
