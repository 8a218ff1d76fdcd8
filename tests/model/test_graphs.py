"""Recorded steps that are kept for the next generation, tried on a CPU, whose native kernels can be recorded too."""

import copy
from dataclasses import replace

import pytest
import torch

from omnimamba_model import GREEDY, cast_matrices, draw, generate_text
from omnimamba_model import backbone as backbone_module
from omnimamba_model.config import BASE, MMU, T2I
from omnimamba_model.dialogue import Dialogue
from omnimamba_model.engine import Row, generate, stream
from omnimamba_model.generation import answer_rows, drawing_rows
from omnimamba_model.graphs import MOST, StepGraphs


@pytest.fixture
def recorded(monkeypatch) -> list:
    """What was recorded: the number of rows of each."""
    found = []
    capture = backbone_module.capture

    def noting(function, *inputs, changes):
        found.append(len(inputs[0]))
        return capture(function, *inputs, changes=changes)

    monkeypatch.setattr(backbone_module, "capture", noting)
    return found


@pytest.fixture
def plain(model):
    found = copy.deepcopy(model)
    found.backbone.graphs = StepGraphs(devices=())
    return found


@pytest.fixture
def graphed(model, recorded):
    """The model with graphs on the CPU, none recorded yet."""
    model.backbone.graphs = StepGraphs(devices=("cpu",))
    return model


@pytest.fixture
def rows(model, caption, features, text):
    """Every task, of unlike lengths and ends, one of them guided."""
    with torch.inference_mode():
        drawn = drawing_rows(model, caption[:1]) + drawing_rows(model, caption[1:2], guidance=2.5)
        answers = answer_rows(model, features[:2], [text[0, :1], text[1, :5]], 6, stop=[3, 9, 17])
        return [
            *drawn,
            Row(BASE, model.backbone.embedding(text[1, :4]), 7, (5,)),
            replace(answers[0], steps=2),
            answers[1],
        ]


def same(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_same_tokens_and_nothing_is_recorded_twice(graphed, plain, rows, recorded):
    expected = generate(plain, rows, GREEDY)
    recorded.clear()
    same(generate(graphed, rows, GREEDY), expected)
    assert len(recorded) > 1, "rows leave at different times"
    recorded.clear()
    for _ in range(2):
        same(generate(graphed, rows, GREEDY), expected)
    assert not recorded


def test_a_graph_a_batch_a_task_and_a_dtype(graphed, plain, caption, features, text, recorded):
    def recordings(function):
        recorded.clear()
        function()
        return list(recorded)

    def answers(count):
        rows = answer_rows(graphed, features[:count], list(text[:count, :3]), 3, stop=())
        return generate(graphed, rows, GREEDY)

    with torch.inference_mode():
        assert recordings(lambda: draw(graphed, caption)) == [3]
        assert recordings(lambda: draw(graphed, caption[:2])) == [2]
        assert recordings(lambda: answers(3)) == [3]
        mixed = drawing_rows(graphed, caption[:1]) + answer_rows(graphed, features[:2], list(text[:2, :3]), 9, stop=())
        other = drawing_rows(graphed, caption[:2]) + answer_rows(graphed, features[:1], list(text[:1, :3]), 9, stop=())
        assert recordings(lambda: generate(graphed, mixed, GREEDY)) == [3]
        recorded.clear()
        same(generate(graphed, other, GREEDY), generate(plain, other, GREEDY))
        assert recorded == [3], "the plain model's; a mixture's graph takes its rows' tasks anew"
    cast_matrices(graphed, torch.bfloat16)
    assert recordings(lambda: draw(graphed, caption)) == [3]
    assert recordings(lambda: draw(graphed, caption)) == []


def test_generations_side_by_side_do_not_share_a_graph(graphed, plain, caption, recorded):
    with torch.inference_mode():
        rows = [drawing_rows(graphed, caption[i : i + 1]) for i in range(3)]
        expected = [generate(plain, row, GREEDY)[0] for row in rows]
        recorded.clear()
        found = zip(*(stream(graphed, row, GREEDY) for row in rows), strict=True)
        found = [[tokens for _, tokens in step] for step in found]
    assert recorded == [1, 1, 1]
    same(torch.tensor(found).T, expected)


@pytest.mark.parametrize("change", ["in place", "replaced", "decay", "merged"])
def test_changed_weights_need_a_new_graph(graphed, plain, caption, change):
    draw(graphed, caption)
    for model in (graphed, plain):
        mixer = model.backbone.layers[0].mixer
        with torch.no_grad():
            if change == "in place":
                mixer.in_proj.t2i_lora_B0.weight.mul_(-5)
            elif change == "replaced":
                mixer.out_proj.weight = torch.nn.Parameter(mixer.out_proj.weight * -5)
            elif change == "decay":
                mixer.A_log.sub_(6)
            else:
                model.merge(T2I)
    same(draw(graphed, caption), draw(plain, caption))
    assert len(graphed.backbone.graphs._free) == 1, "the old one is gone"


def test_a_dialogue_keeps_its_state_while_others_use_its_graph(graphed, plain, features, text, tmp_path):
    with torch.inference_mode():
        heard = []
        for model in (plain, graphed):
            talks = [Dialogue.about(model, features[i]) for i in range(2)]
            said = []
            for turn in range(2):
                for talk in talks:
                    said.append(list(talk.ask(text[1, turn : turn + 3], 5, stop=())))
            early = talks[0].ask(text[2, :3], 5, stop=())
            said += [next(early), next(early)]
            early.close()
            said += [list(talk.ask(text[2, 2:4], 4, stop=())) for talk in talks]
            talks[0].save(tmp_path / "state")
            said.append(list(Dialogue.load(model, tmp_path / "state").ask(text[0, :2], 4, stop=())))
            heard.append(said)
    assert heard[0] == heard[1]
    assert not graphed.backbone.graphs._free[-1].state.ssm.data_ptr() == talks[0].state.ssm.data_ptr()


def test_a_state_that_was_given_outlives_the_stream(graphed, plain, text):
    ends = []
    with torch.inference_mode():
        for model in (plain, graphed):
            state = model.backbone.new_state(1)
            rows = [Row(BASE, model.backbone.embedding(text[1, :4]), 5)]
            list(stream(model, rows, GREEDY, state))
            generate(model, [Row(BASE, model.backbone.embedding(text[2, :4]), 5)], GREEDY)
            ends.append(state)
    assert ends[0].position == ends[1].position and ends[0].ssm.any()
    same([ends[0].conv, ends[0].ssm], [ends[1].conv, ends[1].ssm])


def test_a_released_step_is_over(graphed):
    backbone = graphed.backbone
    with torch.inference_mode():
        state = backbone.new_state(2)
        step = backbone.bind_step(state, MMU)
        step(torch.ones(2, backbone.config.d_model))
        step.release()
        kept = state.ssm.clone()
        backbone.bind_step(backbone.new_state(2), MMU)(torch.ones(2, backbone.config.d_model))
        assert torch.equal(state.ssm, kept) and kept.any() and state.position == 1
        step.release()
        assert len(backbone.graphs._free) == 0, "a second release gives nothing back"
        with pytest.raises(RuntimeError, match="released"):
            step(torch.ones(2, backbone.config.d_model))


def test_only_so_many_wait(lm, recorded):
    lm.backbone.graphs = StepGraphs(devices=("cpu",))
    for rows in range(1, MOST + 3):
        generate_text(lm, torch.zeros(rows, 1, dtype=torch.long), 2)
    assert [graph.kind[0] for graph in lm.backbone.graphs._free] == list(range(3, MOST + 3))


@pytest.mark.parametrize("mixed", [0, 64, 128], ids="one task|mixed, then one task|mixed for less long".split("|"))
def test_many_rows_record_nothing_twice(graphed, plain, caption, text, recorded, mixed):
    """300 rows need ten graphs, more than wait whatever they hold; once fewer than ``mixed`` are left the mixture ends.
    Where that is sooner all their rooms have 939 rows, more than three times those of the largest."""
    rooms = [300, 256, 128, 64, 32, 16, 8, 4, 2, 1]
    with torch.inference_mode():
        said = Row(BASE, graphed.backbone.embedding(text[1, :4]), 1)
        (drawn,) = drawing_rows(graphed, caption[:1])
        rows = [replace(drawn if mixed and i >= mixed and i % 2 else said, steps=1) for i in range(300)]
        rows = [replace(row, steps=1 + sum(i < room for room in rooms)) for i, row in enumerate(rows)]
        if mixed:  # the last drawing is one of so many rows, and leaves room for as many of one task
            rows = [replace(row, steps=row.steps + (i < mixed)) for i, row in enumerate(rows)]
            rows[mixed - 1] = replace(drawn, steps=rows[mixed].steps + 1)
            rooms.insert(rooms.index(mixed), mixed)
        expected = generate(plain, rows, GREEDY)
        recorded.clear()
        for again in (rooms, [], []):
            same(generate(graphed, rows, GREEDY), expected)
            assert recorded == again
            recorded.clear()


def test_what_waits_has_no_more_rows_than_a_generation(lm):
    """Of many rows only as many graphs as that allows, but MOST in any case: their states take memory."""
    lm.backbone.graphs = StepGraphs(devices=("cpu",))
    for rows in (*range(1, 20), 100, *range(60, 80)):
        generate_text(lm, torch.zeros(rows, 1, dtype=torch.long), 2)
        free = [graph.kind[0] for graph in lm.backbone.graphs._free]
        assert len(free) <= MOST or sum(free) <= 4 * max(free)
        assert free[-1] == rows


def test_a_copy_starts_without_graphs(graphed, caption):
    draw(graphed, caption)
    copied = copy.deepcopy(graphed)
    assert graphed.backbone.graphs._free and not copied.backbone.graphs._free
    assert copied.backbone.graphs.devices == ("cpu",)
    same(draw(copied, caption), draw(graphed, caption))


def test_memory_that_cannot_tell_of_changes_is_recorded_anew(graphed, plain, caption, recorded):
    with torch.inference_mode():
        for model in (graphed, plain):
            norm = model.backbone.norm_f
            norm.weight = torch.nn.Parameter(norm.weight.clone(), requires_grad=False)
        assert graphed.backbone.norm_f.weight.is_inference()
        for _ in range(2):
            recorded.clear()
            draw(graphed, caption)
            assert recorded == [3]


@pytest.mark.parametrize("mixed", [False, True], ids=["one task", "mixed"])
def test_few_graphs_serve_while_rows_end_one_by_one(graphed, plain, caption, features, text, recorded, mixed):
    """Of 11 rows, guided ones with their twins among them: graphs for 11, 8, 4, 2 and 1, and none for the next time."""
    with torch.inference_mode():
        rows = [replace(row, steps=2 + i) for i, row in enumerate(drawing_rows(graphed, caption, 2.5))]
        rows += [replace(row, steps=5 + i) for i, row in enumerate(drawing_rows(graphed, caption[:2]))]
        if mixed:
            answers = answer_rows(graphed, features, list(text[:, :3]), 6, stop=())
            rows[3:] = [replace(row, steps=4 + i) for i, row in enumerate(answers)][:2]
        rows += [replace(rows[-1], steps=9 + i) for i in range(3)]
        expected = generate(plain, rows, GREEDY)
        recorded.clear()
        same(generate(graphed, rows, GREEDY), expected)
        assert recorded == [11, 8, 4, 2, 1]
        recorded.clear()
        same(generate(graphed, rows[:2] + rows[3:], GREEDY), expected[:2] + expected[3:])
        assert recorded == [9, 8][: 1 + mixed], "the smaller ones are there, but for answers alone in room for 8"


def test_rows_that_a_step_has_not_are_zeros_and_no_room_for_too_many(graphed):
    backbone = graphed.backbone
    with torch.inference_mode():
        full = backbone.bind_step(backbone.new_state(4), MMU)
        full(torch.ones(4, backbone.config.d_model))
        full.release()
        state = backbone.new_state(3)
        step = backbone.bind_step(state, MMU, room=4)
        (graph,) = [step._graph]
        assert state.ssm.shape[1] == 3 and not graph.state.ssm.any() and not graph.state.conv.any()
        alone = backbone.new_state(3)
        found = step(torch.ones(3, backbone.config.d_model))
        expected = backbone.bind_step(alone, MMU)(torch.ones(3, backbone.config.d_model))
        assert torch.equal(found, expected) and torch.equal(state.ssm, alone.ssm)
        step.release()
        assert state.ssm.shape[1] == 3 and state.ssm.is_contiguous() and torch.equal(state.ssm, alone.ssm)
        with pytest.raises(ValueError, match="room must be for 3 rows or more, got 2"):
            backbone.bind_step(state, MMU, room=2)
