"""Sequence formats, losses and which parameters learn."""

import pytest
import torch
import torch.nn.functional as F

from omnimamba_model import BASE, MMU, T2I, OmniMamba


@torch.no_grad()
def drawing_logits(model: OmniMamba, caption, image, task):
    """All positions of the T2I format, [eoi] included, computed from its definition."""
    b, ids, rows = model.backbone, model.config.tokens, caption.shape[0]
    opening = torch.tensor([[ids.t2i, ids.sot]] * rows)
    middle = torch.tensor([[ids.eot, ids.soi]] * rows)
    last = torch.tensor([[ids.eoi]] * rows)
    said = b.caption_embed(b.embedding(torch.cat([opening, caption, middle], 1)))
    x = torch.cat([said, b.img_embeddings(image), b.caption_embed(b.embedding(last))], 1)
    assert x.shape[1] == model.config.t2i_positions
    return b(x + b.pos_embed, task) @ b.img_embeddings.word_embeddings.weight.T


@torch.no_grad()
def understanding_logits(model: OmniMamba, features, text):
    b, ids, rows = model.backbone, model.config.tokens, text.shape[0]
    opening = b.embedding(torch.tensor([[ids.mmu, ids.soi]] * rows))
    middle = b.embedding(torch.tensor([[ids.eoi, ids.sot]] * rows))
    x = torch.cat([opening, model.projector(features), middle, b.embedding(text)], 1)
    return b(x + b.mmu_pos_embed[:, : x.shape[1]], MMU) @ b.embedding.weight.T


def test_drawing_format_and_loss(model, caption, image):
    full = drawing_logits(model, caption, image, T2I)
    first = model.config.t2i_prompt
    expected = full[:, first - 1 : first - 1 + model.config.image_tokens]
    logits, loss = model("t2i", caption=caption, image=image)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, F.cross_entropy(expected.flatten(0, 1), image.flatten()))


def test_understanding_format_and_loss(model, features, text):
    full = understanding_logits(model, features, text)
    first = model.config.image_features + 4
    expected = full[:, first - 1 : -1]
    logits, loss = model("mmu", features=features, text=text)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    kept = text != model.config.tokens.pad
    torch.testing.assert_close(loss, F.cross_entropy(expected[kept], text[kept]))

    labels = text.clone()
    labels[:, :4] = -100
    labels[0, 5:] = -100
    kept = labels != -100
    torch.testing.assert_close(model.mmu(features, text, labels).loss, F.cross_entropy(expected[kept], text[kept]))


def test_plain_text_uses_no_adapter(model, text):
    logits, loss = model("text", ids=text[:, :-1], labels=text[:, 1:])
    b = model.backbone
    torch.testing.assert_close(logits, b(b.embedding(text[:, :-1]), BASE) @ b.embedding.weight.T)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()))
    assert model.text(text).loss is None


def test_later_tokens_never_change_earlier_predictions(model, caption, image):
    before = model.t2i(caption, image).logits
    changed = image.clone()
    changed[:, 4] = (changed[:, 4] + 1) % model.config.image_vocab_size
    after = model.t2i(caption, changed).logits
    torch.testing.assert_close(after[:, :5], before[:, :5])
    assert not torch.allclose(after[:, 5:], before[:, 5:])


def test_understanding_positions_past_the_table_share_its_last_row(model):
    zeros = torch.zeros(1, 60, model.config.backbone.d_model)
    table = model.backbone.mmu_pos_embed[0]
    added = model.backbone.embed_understanding(zeros, 5)[0]
    assert torch.equal(added[:35], table[5:])
    assert torch.equal(added[35:], table[-1:].expand(25, -1))


def test_captions_are_padded_on_the_left(model, caption):
    assert torch.equal(model.pad_captions([[10, 11, 12], [20, 21, 22, 23], [30, 31, 32, 33, 34, 35, 36]]), caption)


STAGE_PARTS = {
    "base": lambda n: "lora" not in n and not n.startswith("projector") and "mmu_pos" not in n,
    "mmu": lambda n: n.startswith("projector") or "mmu_lora" in n,
    "t2i": lambda n: (
        "t2i_lora" in n
        or n.startswith(
            ("backbone.embedding", "backbone.img_embeddings", "backbone.caption_embed", "backbone.pos_embed")
        )
    ),
    "joint": lambda n: True,
}


@pytest.mark.parametrize("stage", STAGE_PARTS)
def test_gradients_reach_exactly_the_stage(model, stage, caption, image, features, text):
    model.train_only(stage)
    model.train()
    loss = torch.zeros(())
    if stage == "base":
        loss = loss + model.text(text[:, :-1], text[:, 1:]).loss + model.t2i(caption, image).loss
    if stage in ("t2i", "joint"):
        loss = loss + model.t2i(caption, image).loss
    if stage in ("mmu", "joint"):
        loss = loss + model.mmu(features, text).loss
    loss.backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {n for n, _ in model.named_parameters() if STAGE_PARTS[stage](n)}


@pytest.mark.parametrize("stage", STAGE_PARTS)
def test_train_only_names_what_it_frees(model, stage):
    model.train_only("t2i")
    names = model.train_only(stage)
    assert names == [n for n, p in model.named_parameters() if p.requires_grad]
    assert set(names) - {"backbone.mmu_pos_embed"} == {
        n for n, _ in model.named_parameters() if STAGE_PARTS[stage](n)
    } - {"backbone.mmu_pos_embed"}


def test_unknown_stages_are_refused(model):
    with pytest.raises(ValueError, match="stage must be one of base, mmu, t2i, joint, got 'all'"):
        model.train_only("all")


def test_a_few_steps_learn(model, caption, image, features, text):
    torch.manual_seed(0)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = model.t2i(caption, image).loss + model.mmu(features, text).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_wrong_shapes_are_named(model, caption, image, features, text):
    with pytest.raises(ValueError, match=r"caption must have shape \(3, 5\), got \(3, 4\)"):
        model.t2i(caption[:, 1:], image)
    with pytest.raises(ValueError, match=r"image must have shape \(3, 9\), got \(2, 9\)"):
        model.t2i(caption, image[:2])
    with pytest.raises(ValueError, match=r"features must have shape \(3, 6, 12\), got \(3, 5, 12\)"):
        model.mmu(features[:, 1:], text)
    with pytest.raises(ValueError, match=r"labels must have shape \(3, 7\), got \(3, 6\)"):
        model.mmu(features, text, text[:, 1:])
    with pytest.raises(ValueError, match="task must be one of text, t2i, mmu, got 'draw'"):
        model("draw", caption=caption)
