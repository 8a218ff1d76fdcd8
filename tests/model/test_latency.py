"""What is computed once for latency: folded tables, an adapter merged into the weights."""

import copy
import io

import pytest
import torch

from omnimamba_model import OmniMamba, OmniMambaConfig, cast_matrices, cli, draw, load, save
from omnimamba_model import embeddings as embeddings_module
from omnimamba_model.config import MMU, T2I
from omnimamba_model.embeddings import folded, folding_flops
from omnimamba_model.pipeline import Pipeline
from omnimamba_model.training import Phase, Trainer


@torch.no_grad()
def test_folded_tables_draw_the_same(model, caption, image):
    expected, drawn, names = model.t2i(caption, image).logits, draw(model, caption), model.state_dict().keys()
    model.fold()
    assert model.backbone.img_embeddings.folded.shape == model.backbone.img_embeddings.word_embeddings.weight.shape
    assert torch.equal(draw(model, caption), drawn) and model.state_dict().keys() == names
    torch.testing.assert_close(model.t2i(caption, image).logits, expected)
    model.backbone.img_embeddings.folded.zero_()  # it is what drawing looks up
    assert not torch.allclose(model.t2i(caption, image).logits, expected, atol=1e-3)


def test_folding_in_parts_is_folding_at_once(model):
    table, mlp = model.backbone.img_embeddings.word_embeddings, model.backbone.img_embeddings.project_in
    torch.testing.assert_close(folded(table, mlp, rows=5), mlp(table.weight).detach())
    assert folded(cast_matrices(model, torch.bfloat16).backbone.embedding, torch.nn.Identity()).dtype == torch.bfloat16


@torch.no_grad()
def test_a_merged_adapter_serves_its_task_alone(model, caption, image, features, text, tmp_path):
    drawing = model.t2i(caption, image).logits
    plain = copy.deepcopy(model)
    for name, parameter in plain.named_parameters():
        if "t2i_lora_B0" in name:
            parameter.zero_()
    assert not torch.allclose(drawing, plain.t2i(caption, image).logits, atol=1e-2)  # the adapters are heard
    model.merge(T2I)
    torch.testing.assert_close(model.t2i(caption, image).logits, drawing, atol=1e-4, rtol=1e-4)
    for refused in (
        lambda: model.mmu(features, text),
        lambda: model.text(text),
        lambda: model.backbone(torch.zeros(2, 1, model.config.backbone.d_model), torch.tensor([MMU, T2I])),
        lambda: model.merge(MMU),
        lambda: save(model, tmp_path / "merged"),
    ):
        with pytest.raises(ValueError, match="merged"):
            refused()
    assert not (tmp_path / "merged").exists()


def test_weights_loaded_over_merged_ones_are_routed_again(model, caption):
    """``save`` never writes merged weights, so that what is loaded is as trained."""
    given, drawn = {name: tensor.clone() for name, tensor in model.state_dict().items()}, draw(model, caption)
    model.merge(T2I)
    model.load_state_dict({name: t for name, t in given.items() if "_lora_" in name}, strict=False)
    assert model.merged == T2I, "the weight is as it was"
    model.load_state_dict(given)
    assert model.merged is None and torch.equal(draw(model, caption), drawn)
    model.merge(MMU)


def test_a_merged_model_does_not_learn(model):
    """Its adapter would get no gradient."""
    model.merge(T2I)
    for change in (model.train, lambda: Trainer(model, Phase("", "t2i", ("t2i",), 1, 0.1), {"t2i": None})):
        with pytest.raises(ValueError, match="adapter of t2i is merged; load the model again to train it"):
            change()
    assert model.eval().merged == T2I


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_a_merged_adapter_answers_the_same(model, features, text, dtype):
    cast_matrices(model, dtype)
    apart = model.mmu(features, text).logits.float()
    model.merge(MMU)
    together = model.mmu(features, text).logits.float()
    assert (together - apart).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * apart.norm()


def test_both_by_command(folder, tmp_path, monkeypatch):
    loaded = []
    begin = Pipeline.load
    monkeypatch.setattr(Pipeline, "load", classmethod(lambda cls, *a, **o: loaded.append(begin(*a, **o)) or loaded[-1]))
    generate = ["generate", "--checkpoint", str(folder), "--prompt", "word3", "--temperature", "0", "--out"]
    assert cli.main([*generate, str(tmp_path / "plain.png"), "--no-fold"]) == 0
    assert cli.main([*generate, str(tmp_path / "quick.png"), "--merge"]) == 0
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "quick.png").read_bytes()
    plain, quick = (pipeline.model for pipeline in loaded)
    assert plain.merged is None and plain.backbone.caption_embed.folded is None
    assert quick.merged == T2I and quick.backbone.caption_embed.folded is not None
    ask = ["ask", "--checkpoint", str(folder), "--image", str(folder / "a.png"), "--question", "word5", "--merge"]
    assert cli.main(ask) == 0 and loaded[-1].model.merged == MMU
    assert loaded[-1].model.backbone.caption_embed.folded is None, "an answer looks nothing up"


def test_tables_are_folded_at_load_and_what_is_saved_is_not(folder, caption, image, tmp_path):
    made, plain = Pipeline.load(folder).model, Pipeline.load(folder, fold=False).model
    tables = made.backbone.img_embeddings.folded, made.backbone.caption_embed.folded
    assert all(table is not None for table in tables) and plain.backbone.img_embeddings.folded is None
    made.save_pretrained(tmp_path / "again")
    again, first = load(tmp_path / "again").state_dict(), load(folder).state_dict()
    assert again.keys() == first.keys() and all(torch.equal(again[name], first[name]) for name in first)


def test_tables_are_folded_unasked_where_that_is_quick(folder, tmp_path, monkeypatch):
    """By load and by command; a table that takes long is folded where it is asked for, and on a GPU."""
    loaded, begin = [], Pipeline.load

    def load(*given, **options):
        loaded.append(begin(*given, **options))
        return loaded[-1]

    def tables(*options):
        command = ["generate", "--checkpoint", str(folder), "--prompt", "word3", "--out", str(tmp_path / "a.png")]
        assert cli.main([*command, *options]) == 0
        return loaded.pop().model.backbone.caption_embed.folded

    quick = begin(folder).model
    backbone = quick.backbone
    flops = folding_flops(backbone.img_embeddings.word_embeddings, backbone.img_embeddings.project_in)
    flops += folding_flops(backbone.embedding, backbone.caption_embed.cap_proj)
    monkeypatch.setattr(embeddings_module, "QUICK_TO_FOLD", flops)
    assert begin(folder).model.backbone.caption_embed.folded is not None
    monkeypatch.setattr(embeddings_module, "QUICK_TO_FOLD", flops - 1)
    assert begin(folder).model.backbone.caption_embed.folded is None
    assert begin(folder, fold=True).model.backbone.caption_embed.folded is not None
    assert quick.to("meta").backbone.quick_to_fold(), "as a GPU is, another device than the CPU"
    monkeypatch.setattr(Pipeline, "load", load)
    assert tables() is None and tables("--no-fold") is None and tables("--fold") is not None
    monkeypatch.undo()
    monkeypatch.setattr(Pipeline, "load", load)
    assert tables() is not None and tables("--no-fold") is None and tables("--fold") is not None


@pytest.mark.parametrize("size, quick", [("tiny", True), ("1.3b", False)])
def test_what_a_cpu_folds_unasked(size, quick):
    """2 FLOPs a row and number: of the image MLP 2 mlp_ratio + 1 squares of d_model, of caption_embed 2."""
    with torch.device("meta"):
        backbone = OmniMamba(OmniMambaConfig.preset(size)).backbone
    config = OmniMambaConfig.preset(size)
    square = config.backbone.d_model**2
    image = folding_flops(backbone.img_embeddings.word_embeddings, backbone.img_embeddings.project_in)
    caption = folding_flops(backbone.embedding, backbone.caption_embed.cap_proj)
    assert image == 2 * config.image_vocab_size * (2 * config.mlp_ratio + 1) * square
    assert caption == 2 * config.backbone.vocab_size * 2 * square
    assert (image + caption <= embeddings_module.QUICK_TO_FOLD) == quick


def learned(model, rate=0.1):
    """A step of somebody's own loop, on the gradients that there are."""
    torch.optim.SGD(model.parameters(), rate).step()
    model.zero_grad()


@pytest.mark.parametrize(
    "change", ["trained", "by a loop of one's own", "by it with words", "other weights", "the backbone's alone"]
)
def test_folded_tables_do_not_outlive_their_weights(model, caption, image, text, change):
    """``train`` is never called in a loop of one's own; words teach the table that captions are looked up in too."""
    model.eval().fold()
    stale = draw(model, caption)
    if change == "by a loop of one's own":
        plain = copy.deepcopy(model)
        plain.backbone.unfold()
        for each in (model, plain):
            each.t2i(caption, image).loss.backward()
        for (name, found), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert (found.grad is None) == (expected.grad is None), name
            assert found.grad is None or torch.equal(found.grad, expected.grad), name
        assert model.backbone.img_embeddings.project_in.projector[0].weight.grad.any()
        assert model.backbone.caption_embed.cap_proj.fc1.weight.grad.any()
        learned(model)
        expected = copy.deepcopy(model)
    elif change == "by it with words":
        model.text(text[:, :-1], text[:, 1:]).loss.backward()
        learned(model, 10.0)
        expected = copy.deepcopy(model)
    elif change == "trained":
        trainer = Trainer(
            model, Phase("", "t2i", ("t2i",), 3, 0.1), {"t2i": lambda _: ("t2i", {"caption": caption, "image": image})}
        )
        for _ in range(3):
            trainer.step()
        trainer.finish()
        expected = copy.deepcopy(model)
    else:
        torch.manual_seed(5)
        expected = type(model)(model.config).eval()
        alone = change == "the backbone's alone"
        (model.backbone if alone else model).load_state_dict((expected.backbone if alone else expected).state_dict())
    assert model.backbone.img_embeddings.folded is model.backbone.caption_embed.folded is None
    assert torch.equal(draw(model, caption), draw(expected, caption)) and not torch.equal(draw(model, caption), stale)


def other_weights_of(part):
    """What part of the backbone gets, and how."""

    def loaded(model, other):
        model.backbone.get_submodule(part).load_state_dict(other.backbone.get_submodule(part).state_dict())

    return loaded


def written_into(model, other):
    with torch.no_grad():
        model.backbone.img_embeddings.project_in.projector[4].bias.copy_(other.backbone.norm_f.weight)


def put_in_place(model, other):
    model.backbone.embedding.weight = other.backbone.embedding.weight


def assigned(model, other):
    part = model.backbone.caption_embed
    part.load_state_dict(other.backbone.caption_embed.state_dict(), assign=True)


def cast(model, other):
    cast_matrices(model, torch.bfloat16)


def by_data(model, other):
    model.backbone.img_embeddings.word_embeddings.weight.data = other.backbone.img_embeddings.word_embeddings.weight


CHANGES = [
    *map(other_weights_of, ("img_embeddings", "img_embeddings.project_in.projector.2", "embedding", "caption_embed")),
    written_into, put_in_place, assigned, cast, by_data,
]  # fmt: skip


@pytest.mark.parametrize("copied", [False, True], ids=["", "copied"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_any_weight_that_tables_passed_shows(model, caption, change, copied):
    """Without the model's own ``load_state_dict``, ``train`` or gradients."""
    torch.manual_seed(5)
    other = type(model)(model.config).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(3)
    plain = copy.deepcopy(model)
    model.eval().fold()
    model = copy.deepcopy(model) if copied else model
    before = draw(model, caption)
    assert model.backbone.img_embeddings.folded is not None is not model.backbone.caption_embed.folded
    for each in (model, plain):
        change(each, other)
    assert torch.equal(draw(model, caption), draw(plain, caption))
    with torch.no_grad():
        torch.testing.assert_close(model.t2i_opening(caption), plain.t2i_opening(caption))
        tokens = torch.arange(model.config.image_vocab_size)[None]
        torch.testing.assert_close(model.backbone.img_embeddings(tokens), plain.backbone.img_embeddings(tokens))
    if change is not cast:
        assert not torch.equal(draw(model, caption), before)


def test_no_weight_comes_to_lie_where_an_old_one_did(model):
    """Weights that were replaced twice may get the first ones' memory."""
    model.eval().fold()
    part = model.backbone.img_embeddings.word_embeddings
    at = part.weight.data_ptr()
    for i in range(50):
        part.weight = torch.nn.Parameter(torch.full_like(part.weight, i))
        assert part.weight.data_ptr() != at
    assert model.backbone.img_embeddings.folded is None


def test_weights_that_inference_mode_made_can_be_folded(config, caption):
    with torch.inference_mode():
        model = OmniMamba(config).eval()
        plain = draw(model, caption)
        model.fold()
        assert model.backbone.img_embeddings.folded is not None and torch.equal(draw(model, caption), plain)


def test_what_unfolds_and_what_does_not(model, caption, image, text):
    """A copy and a pickle of a model have hooks of their own; what neither learns nor changes goes on looking up."""

    def looked_up(one):
        held = [table.folded is not None for table in (one.backbone.img_embeddings, one.backbone.caption_embed)]
        assert held[0] == held[1]
        return held[0]

    model.eval().fold()
    written = io.BytesIO()
    torch.save(model, written)
    written.seek(0)
    copies = [copy.deepcopy(model), torch.load(written, weights_only=False)]
    with torch.inference_mode():
        model.t2i(caption, image)
        model.text(text)
    draw(model, caption)
    assert looked_up(model.eval()) and all(map(looked_up, copies))
    for one in copies:
        one.backbone.load_state_dict(model.backbone.state_dict())
        assert not looked_up(one) and looked_up(model)
    for change in (model.train, model.backbone.train, lambda: model.text(text), lambda: model.t2i(caption, image)):
        model.eval().fold()
        change()
        assert not looked_up(model)
