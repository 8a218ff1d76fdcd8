"""Rows of any task, length and end side by side: each as if it were alone."""

import weakref
from dataclasses import replace

import pytest
import torch

from omnimamba_model import BASE, GREEDY, Sampling, answer, draw, engine, generate_text
from omnimamba_model.engine import Row, generate, stream
from omnimamba_model.generation import answer_rows, drawing_rows
from omnimamba_model.sampling import penalised, probabilities


def alone(model, row, sampling=GREEDY):
    return generate(model, [row], sampling)[0]


@pytest.fixture
def rows(model, caption, features, text):
    """Two drawings, one of them guided, three answers of unlike lengths, plain text."""
    with torch.inference_mode():
        questions = [text[0, :1], text[1, :5], text[2, :3]]
        plain = Row(BASE, model.backbone.embedding(text[1, :4]), 7, (5,))
        drawn = drawing_rows(model, caption[:1]) + drawing_rows(model, caption[1:2], guidance=2.5)
        return [drawn[0], plain, *answer_rows(model, features, questions, 12, stop=[3, 9, 17]), drawn[1]]


def test_mixed_tasks_and_lengths_are_as_if_alone(model, rows):
    together = generate(model, rows, GREEDY)
    assert len({len(row) for row in together}) > 1
    for row, found in zip(rows, together, strict=True):
        assert torch.equal(found, alone(model, row)), row.task


@pytest.mark.parametrize("mixed", [False, True], ids=["drawings", "with answers"])
def test_each_row_has_its_own_guidance_and_its_own_penalty(model, caption, features, text, mixed):
    """Scales of every size and sign beside rows without; what a row has drawn counts for that row alone."""
    sampling = Sampling(temperature=0.0, repetition_penalty=1.7)
    with torch.inference_mode():
        rows = [drawing_rows(model, caption[i : i + 1], g)[0] for i, g in enumerate((4.0, 1.0, -2.0))]
        rows = [replace(row, steps=5) for row in drawing_rows(model, caption[:2], 1.5)] + rows
        if mixed:
            rows[1:1] = answer_rows(model, features[:2], [text[0, :1], text[1, :5]], 7, stop=())
    together = generate(model, rows, sampling)
    for row, found in zip(rows, together, strict=True):
        assert torch.equal(found, alone(model, row, sampling))
    assert not torch.equal(together[-3], alone(model, replace(rows[-3], guidance=1.5), sampling))
    free = generate(model, rows, GREEDY)
    assert any(not torch.equal(a, b) for a, b in zip(free, together, strict=True))


@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_what_a_row_has_drawn_is_kept_for_a_penalty_alone(model, rows, penalty):
    """A mask as large as the logits, which every end of a row would copy."""
    with torch.inference_mode():
        batch = engine._Batch(model, rows, Sampling(temperature=0.0, repetition_penalty=penalty), None)
        batch.advance(batch.draw())
        held = {task: drawn.sum(1).tolist() for task, drawn in batch.drawn.items()}
        places = {task: [i for i, row in enumerate(batch.rows) if row.task == task] for task in batch.groups}
        batch.step.release()
    assert held == ({} if penalty == 1.0 else {task: [1] * len(own) for task, own in places.items()})


def test_guidance_is_as_exact_as_the_model(model, caption, monkeypatch):
    given, real = [], engine.sample
    monkeypatch.setattr(engine, "sample", lambda logits, *rest: given.append(logits.clone()) or real(logits, *rest))
    with torch.inference_mode():
        (row,) = drawing_rows(model.double(), caption[:1], guidance=2.3)
        ends = [
            model.image_head(model.backbone.prefill(prompt[None], model.backbone.new_state(1), row.task))
            for prompt in (row.prompt, row.null)
        ]
    alone(model, row)
    asked, free = ends
    torch.testing.assert_close(given[0], free + 2.3 * (asked - free), rtol=1e-9, atol=1e-12)


def test_guided_rows_that_end_at_different_times_keep_their_own_null_prompt(model, caption):
    with torch.inference_mode():
        rows = drawing_rows(model, caption, guidance=3.0)
        ends = zip(rows, (2, 9, 5), strict=True)
        rows = [
            replace(row, steps=steps, null=row.null + i, guidance=3.0 - 3 * i) for i, (row, steps) in enumerate(ends)
        ]
    for row, found in zip(rows, generate(model, rows, GREEDY), strict=True):
        assert torch.equal(found, alone(model, row))


def test_packed_prefill_leaves_the_states_of_each_prompt_alone(model, rows):
    with torch.inference_mode():
        prompts, tasks = [row.prompt for row in rows], torch.tensor([row.task for row in rows])
        packed, hidden = model.backbone.prefill_packed(prompts, tasks)
        for i, (prompt, task) in enumerate(zip(prompts, tasks.tolist(), strict=True)):
            state = model.backbone.new_state(1)
            last = model.backbone.prefill(prompt[None], state, task)
            torch.testing.assert_close(hidden[i], last[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(packed.conv[:, i], state.conv[:, 0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(packed.ssm[:, i], state.ssm[:, 0], rtol=1e-4, atol=1e-4)


def test_prompts_shorter_than_the_convolution(model):
    """The states then reach before the prompt's beginning."""
    with torch.inference_mode():
        prompts = [torch.randn(length, 32, generator=torch.Generator().manual_seed(length)) for length in (1, 2, 9)]
        packed, _ = model.backbone.prefill_packed(prompts)
        for i, prompt in enumerate(prompts):
            state = model.backbone.new_state(1)
            model.backbone.prefill(prompt[None], state)
            torch.testing.assert_close(packed.conv[:, i], state.conv[:, 0], rtol=1e-4, atol=1e-4)


def test_copies_share_a_prefill_and_differ(model, caption, monkeypatch):
    taken, prefill = [], type(model.backbone).prefill
    monkeypatch.setattr(
        type(model.backbone), "prefill", lambda self, *given: taken.append(given[0].shape[0]) or prefill(self, *given)
    )
    many = draw(model, caption, Sampling(seed=1), copies=4)
    assert taken == [3]
    assert many.shape == (12, 9) and len(many.unique(dim=0)) > 3
    assert torch.equal(draw(model, caption, GREEDY, copies=2), draw(model, caption, GREEDY).repeat_interleave(2, 0))
    guided = draw(model, caption, GREEDY, guidance=3.0, copies=2)
    assert torch.equal(guided, draw(model, caption, GREEDY, guidance=3.0).repeat_interleave(2, 0))
    with pytest.raises(ValueError, match="copies must be a whole number"):
        draw(model, caption, copies=0)


def test_tokens_stream_as_they_come(model, features, text):
    with torch.inference_mode():
        rows = answer_rows(model, features, list(text[:, :3]), 6, stop=[])
        steps = list(stream(model, rows, GREEDY))
    assert [alive for alive, _ in steps] == [[0, 1, 2]] * 6
    assert torch.equal(
        torch.stack([tokens for _, tokens in steps], 1), answer(model, features, text[:, :3], 6, stop=[])
    )


def test_a_stream_keeps_no_gradients_and_leaves_the_callers_mode(model, caption):
    rows = drawing_rows(model, caption)
    assert rows[0].prompt.requires_grad
    for _, tokens in stream(model, rows, GREEDY):
        assert tokens.is_inference() and not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_several_stop_tokens(lm):
    ids = torch.randint(64, (2, 5), generator=torch.Generator().manual_seed(0))
    free = generate_text(lm, ids, 12)
    stops = [int(free[0, 3]), int(free[1, 5])]
    out = generate_text(lm, ids, 12, stop=stops)
    for row, other in zip(free.tolist(), out.tolist(), strict=True):
        end = min(row.index(s) for s in stops if s in row) if set(stops) & set(row) else 11
        assert other[: end + 1] == row[: end + 1] and len(set(other[end:])) == 1


def test_repeated_tokens_are_penalised(lm):
    ids = torch.randint(64, (1, 5), generator=torch.Generator().manual_seed(0))
    row = generate_text(lm, ids, 20, Sampling(temperature=0, repetition_penalty=1e9))[0].tolist()
    assert len(set(row)) == 20 > len(set(generate_text(lm, ids, 20)[0].tolist()))
    logits, drawn = torch.tensor([[2.0, -1.0, 3.0]]), torch.tensor([[True, True, False]])
    assert penalised(logits, drawn, 2.0).tolist() == [[1.0, -2.0, 3.0]]


def test_min_p_keeps_what_is_likely_enough():
    logits = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log()
    kept = probabilities(logits, Sampling(min_p=0.25))[0]
    torch.testing.assert_close(kept, torch.tensor([0.5, 0.2, 0.15, 0, 0]) / 0.85)
    for wrong, message in [(dict(min_p=1.5), "min_p must lie"), (dict(repetition_penalty=0.0), "repetition_penalty")]:
        with pytest.raises(ValueError, match=message):
            Sampling(**wrong)


def test_memory_does_not_grow_with_tokens(lm):
    """The state's bytes, and what Python keeps a token: nothing but the token."""
    import tracemalloc

    ids = torch.zeros(1, 3, dtype=torch.long)
    generate_text(lm, ids, 10)
    peaks = []
    for steps in (50, 500):
        tracemalloc.start()
        generate_text(lm, ids, steps)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 450 * 600  # one small tensor a token


def test_no_logits_outlive_their_step(lm, monkeypatch):
    made, real = [], engine.sample

    def noting(logits, *rest):
        made.append(weakref.ref(logits))
        return real(logits, *rest)

    monkeypatch.setattr(engine, "sample", noting)
    row = Row(BASE, lm.backbone.embedding(torch.zeros(3, dtype=torch.long)).detach(), 50)
    for _ in engine.stream(lm, [row], GREEDY):
        assert sum(logits() is not None for logits in made) <= 2
    assert len(made) == 50
