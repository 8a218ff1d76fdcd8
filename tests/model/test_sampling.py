"""Every way of picking a token, against a definition in plain numbers, on batches of mixed tasks and ends."""

import math
import random

import pytest
import torch

from omnimamba_model import BASE, T2I, Sampling, engine
from omnimamba_model.engine import Row, generate, stream
from omnimamba_model.generation import answer, answer_rows, draw, drawing_rows
from omnimamba_model.sampling import penalised, probabilities

SETTINGS = {
    "as they are": {},
    "warm": {"temperature": 1.7},
    "cold": {"temperature": 0.4},
    "coldest": {"temperature": 0.0},
    "top k": {"top_k": 3},
    "the first": {"top_k": 1},
    "top p": {"top_p": 0.7},
    "min p": {"min_p": 0.3},
    "penalty": {"repetition_penalty": 1.8},
    "praise": {"repetition_penalty": 0.5},
    "penalty, coldest": {"repetition_penalty": 3.0, "temperature": 0.0},
    "all": {"temperature": 1.3, "top_k": 9, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.5},
}


def defined(logits: list[float], drawn: set[int], given: Sampling) -> list[float]:
    """The chance of every token."""
    rate = given.repetition_penalty
    scores = [(z / rate if z > 0 else z * rate) if i in drawn else z for i, z in enumerate(logits)]
    likeliest = scores.index(max(scores))
    if given.temperature == 0 or given.top_k == 1:
        return [float(i == likeliest) for i in range(len(scores))]
    left = set(range(len(scores)))
    if given.top_k:
        kth = sorted(scores, reverse=True)[: given.top_k][-1]
        left = {i for i in left if scores[i] >= kth}
    weights = {i: math.exp((scores[i] - scores[likeliest]) / given.temperature) for i in left}
    weights = {i: w for i, w in weights.items() if w >= given.min_p}  # the likeliest weighs 1
    reached, whole, kept = 0.0, sum(weights.values()), {}
    for i in sorted(weights, key=weights.get, reverse=True):
        if reached >= given.top_p * whole:
            break
        kept[i] = weights[i]
        reached += weights[i]
    return [kept.get(i, 0.0) / reached for i in range(len(scores))]


@pytest.mark.parametrize("given", SETTINGS.values(), ids=SETTINGS)
def test_chances_of_many_rows_are_as_defined(given):
    sampling, draw = Sampling(**given), random.Random(0)
    logits = torch.randn(40, 23, generator=torch.Generator().manual_seed(1)) * 3
    drawn = torch.tensor([[draw.random() < 0.3 for _ in row] for row in logits])
    changed = penalised(logits, drawn, sampling.repetition_penalty)
    if sampling.greedy:
        found = torch.nn.functional.one_hot(changed.argmax(-1), 23).float()
    else:
        found = probabilities(changed, sampling)
    marks = [{i for i, on in enumerate(row) if on} for row in drawn.tolist()]
    expected = [defined(row, mark, sampling) for row, mark in zip(logits.tolist(), marks, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.fixture
def rows(model, caption, features, text) -> list[Row]:
    """Drawings with and without guidance, twins of one prompt, answers and plain text, unlike lengths and ends."""
    with torch.inference_mode():
        drawn = drawing_rows(model, caption[:1]) + drawing_rows(model, caption[1:2], guidance=2.5, copies=2)
        plain = Row(BASE, model.backbone.embedding(text[1, :4]), 7, (5, 11))
        answers = answer_rows(model, features[:2], [text[0, :1], text[1, :5]], 12, stop=[3, 9, 17, 21, 30])
        return [drawn[0], plain, *answers, drawn[1]]


def whole_pass(model, row: Row, said: list[int]) -> list[float]:
    """The next token's logits, by a pass over the prompt and all that was said."""
    backbone, place = model.backbone, len(row.prompt) if row.place is None else row.place
    ids = torch.tensor([said], dtype=torch.long)
    if row.task == T2I:
        after, head = backbone.embed_image(ids, place), model.image_head
    else:
        after, head = backbone.embedding(ids), model.text_head
        after = after if row.task == BASE else backbone.embed_understanding(after, place)

    def logits(prompt):
        return head(backbone(torch.cat([prompt[None], after], dim=1), row.task)[0, -1])

    asked = logits(row.prompt)
    if row.null is not None:
        free = logits(row.null)
        asked = free + row.guidance * (asked - free)
    return asked.tolist()


@pytest.mark.parametrize("given", SETTINGS.values(), ids=SETTINGS)
def test_mixed_batches_draw_from_the_defined_chances(model, rows, given, monkeypatch):
    """Of every step and row; a row ends at its first stop token or after its steps; a seed repeats."""
    sampling, seen, sample = Sampling(**given, seed=5), [], engine.sample

    def noting(logits, *others):
        tokens = sample(logits, *others)
        seen.extend(zip(logits, tokens.tolist(), strict=True))
        return tokens

    monkeypatch.setattr(engine, "sample", noting)
    owners = [row for row in rows for _ in range(row.copies)]
    said: list[list[int]] = [[] for _ in owners]
    with torch.inference_mode():
        for alive, tokens in stream(model, rows, sampling):
            by_task = sorted(alive, key=lambda i: owners[i].task)  # each task's rows are drawn together
            for i, (logits, token) in zip(by_task, seen, strict=True):
                expected = torch.tensor(defined(whole_pass(model, owners[i], said[i]), set(said[i]), sampling))
                if sampling.greedy:
                    assert expected.argmax() == token
                else:
                    found = probabilities(logits[None], sampling)[0]
                    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
                    assert expected[token] > 0
                said[i].append(token)
            assert [said[i][-1] for i in alive] == tokens.tolist()
            seen.clear()
    for row, heard in zip(owners, said, strict=True):
        ends = [at for at, token in enumerate(heard) if token in row.stop]
        assert ends == [len(heard) - 1] or (not ends and len(heard) == row.steps)
    monkeypatch.undo()
    assert [found.tolist() for found in generate(model, rows, sampling)] == said
    other = [found.tolist() for found in generate(model, rows, Sampling(**given, seed=6))]
    assert (other == said) == sampling.greedy
    assert said[-1] != said[-2] or sampling.greedy, "copies of one prompt are drawn apart"


EXTREME = [
    {"top_p": 5e-324}, {"min_p": 5e-324}, {"repetition_penalty": 1e-300}, {"repetition_penalty": 1e300},
    {"repetition_penalty": 1e-40}, {"temperature": 1e300}, {"repetition_penalty": 1e-40, "temperature": 1e-30},
    {"repetition_penalty": 1e300, "temperature": 1e300, "top_p": 1e-40},
]  # fmt: skip


@pytest.mark.parametrize("given", EXTREME, ids=str)
@pytest.mark.parametrize("guidance", [1.0, 3e38, -3e38])
def test_extreme_arguments_still_pick_tokens(model, caption, features, text, given, guidance):
    rows = drawing_rows(model, caption[:2], guidance) + answer_rows(model, features[:1], [text[1, :3]], 20, stop=())
    found = generate(model, rows, Sampling(**given, seed=1))
    assert [len(row) for row in found] == [9, 9, 20]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(seed=0), Sampling(seed=0, top_p=0.5)])
def test_what_is_no_number_is_told_and_never_drawn(model, features, text, caption, wrong, sampling):
    """Greedily the likeliest of what is no number would be the first token there is: an empty answer."""
    with torch.no_grad():
        model.backbone.norm_f.weight[3] = wrong
    for run in (lambda: answer(model, features, text, 3, sampling), lambda: draw(model, caption, sampling, 2.0)):
        with pytest.raises(RuntimeError, match="logits are not finite: the weights or what the model was shown"):
            run()
