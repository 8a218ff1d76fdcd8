"""Turns on one state: the same tokens as if all of it were read anew, whole, saved or interrupted."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from omnimamba_model import CheckpointError, OmniMamba, OmniMambaConfig, Sampling, cast_matrices
from omnimamba_model.cli import main
from omnimamba_model.config import MMU
from omnimamba_model.dialogue import Chat, Dialogue
from omnimamba_model.pipeline import Pipeline

QUESTIONS = [torch.tensor([10, 11, 12]), torch.tensor([20]), torch.tensor([30, 31])]


@torch.no_grad()
def reread(model, features, ids, steps, stop):
    """The next answer by full passes over everything said so far, and what was said then: a turn that was cut at
    ``steps`` tokens is closed by the end of text."""
    grown, said = list(ids), []
    for _ in range(steps):
        text = torch.tensor([[*grown, 0]])
        token = int(model.mmu(features[None], text).logits[0, -1].argmax())
        grown.append(token)
        if token == stop:
            break
        said.append(token)
    else:
        grown.append(model.config.tokens.eos)
    return grown, said


@pytest.mark.parametrize("stop", [63, None])
def test_every_turn_is_as_if_all_were_read_anew(model, features, stop):
    if stop is None:  # a token that does come up
        stop = next(iter(Dialogue.about(model, features[0]).ask(QUESTIONS[0], 3, stop=(63,))))
    dialogue, known = Dialogue.about(model, features[0]), []
    for question in QUESTIONS:
        known, expected = reread(model, features[0], [*known, *question.tolist()], 4, stop)
        assert list(dialogue.ask(question, 4, stop=(stop,))) == expected


def test_a_saved_dialogue_goes_on(model, features, tmp_path):
    dialogue = Dialogue.about(model, features[0])
    known, said = reread(model, features[0], QUESTIONS[0].tolist(), 4, 63)
    assert list(dialogue.ask(QUESTIONS[0], 4, stop=(63,))) == said and known[-1] == model.config.tokens.eos
    dialogue.save(tmp_path / "state")
    again = Dialogue.load(model, tmp_path / "state")
    expected = reread(model, features[0], [*known, *QUESTIONS[1].tolist()], 5, 0)[1]
    assert list(again.ask(QUESTIONS[1], 5)) == list(dialogue.ask(QUESTIONS[1], 5)) == expected
    (tmp_path / "state").write_bytes((tmp_path / "state").read_bytes()[:100])
    with pytest.raises(CheckpointError, match="no dialogue's state"):
        Dialogue.load(model, tmp_path / "state")
    with pytest.raises(CheckpointError, match="does not exist"):
        Dialogue.load(model, tmp_path / "none")
    config = json.dumps(model.config.to_dict())
    for about in ({"position": "-1", "config": config}, {"position": "1", "config": "[" * 100_000}, {}):
        save_file({"conv": dialogue.state.conv, "ssm": dialogue.state.ssm}, tmp_path / "state", metadata=about)
        with pytest.raises(CheckpointError, match="no dialogue's state"):
            Dialogue.load(model, tmp_path / "state")
    with pytest.raises(CheckpointError, match="no dialogue's state"):
        Dialogue.load(model, tmp_path)  # a folder
    dialogue.save(tmp_path / "state")
    other = OmniMamba(OmniMambaConfig.preset("tiny", lora_rank=2))
    with pytest.raises(CheckpointError, match="another model"):
        Dialogue.load(other, tmp_path / "state")
    for name in ("projector.projector.4.bias", "backbone.layers.1.mixer.in_proj.mmu_lora_B0.weight"):
        taught = copy.deepcopy(model)
        with torch.no_grad():
            taught.get_parameter(name).add_(0.5)
        with pytest.raises(CheckpointError, match="of one size with this, but of other weights"):
            Dialogue.load(taught, tmp_path / "state")
    for kept in (torch.bfloat16, torch.float16, torch.int8):  # the same weights
        same = cast_matrices(copy.deepcopy(model), kept)
        same.merge(MMU)
        same.fold()
        assert Dialogue.load(same, tmp_path / "state").state.position == dialogue.state.position


def test_who_stops_listening_has_heard_what_the_state_knows(model, features):
    dialogue = Dialogue.about(model, features[0])
    said = dialogue.ask(QUESTIONS[0], 9, stop=(63,))
    heard = [next(said), next(said)]
    said.close()
    known = [*QUESTIONS[0].tolist(), *heard, model.config.tokens.eos, *QUESTIONS[1].tolist()]
    assert list(dialogue.ask(QUESTIONS[1], 4, stop=(63,))) == reread(model, features[0], known, 4, 63)[1]


@pytest.mark.parametrize("late", ["dropped at the end", "closed within the next turn"])
def test_a_turn_left_half_heard_is_over_where_the_next_begins(model, features, tmp_path, late):
    """Somebody may still hold it: a page, a list."""
    dialogue = Dialogue.about(model, features[0])
    left = dialogue.ask(QUESTIONS[0], 9, stop=(63,))
    known = [*QUESTIONS[0].tolist(), next(left), next(left), model.config.tokens.eos]
    following, said = dialogue.ask(QUESTIONS[1], 4, stop=(63,)), []
    for token in following:
        said.append(token)
        if late != "dropped at the end":
            left.close()
    known, expected = reread(model, features[0], [*known, *QUESTIONS[1].tolist()], 4, 63)
    assert said == expected and list(left) == []
    half = dialogue.ask(QUESTIONS[0], 9, stop=(63,))
    known += [*QUESTIONS[0].tolist(), next(half), model.config.tokens.eos, *QUESTIONS[1].tolist()]
    dialogue.save(tmp_path / "state")
    expected = reread(model, features[0], known, 4, 63)[1]
    for again in (Dialogue.load(model, tmp_path / "state"), dialogue):
        assert list(again.ask(QUESTIONS[1], 4, stop=(63,))) == expected


def test_any_thread_may_take_the_next_token_and_no_ones_mode_is_changed(model, features):
    expected = list(Dialogue.about(model, features[0]).ask(QUESTIONS[0], 6, stop=()))
    said, heard = Dialogue.about(model, features[0]).ask(QUESTIONS[0], 6, stop=()), []
    with ThreadPoolExecutor(1) as other:
        for i in range(6):
            heard.append(other.submit(next, said).result() if i % 2 else next(said))
            assert not torch.is_inference_mode_enabled()
            assert not other.submit(torch.is_inference_mode_enabled).result()
        other.submit(said.close).result()
    assert heard == expected and not torch.is_inference_mode_enabled()


def test_questions_are_checked(model, features):
    for steps in (0, -1, 1.5, None):
        with pytest.raises(ValueError, match="steps must be (1 or more|a whole number), got"):
            next(Dialogue.about(model, features[0]).ask(QUESTIONS[0], steps))
    with pytest.raises(ValueError, match="l at least 1"):
        next(Dialogue.about(model, features[0]).ask(torch.tensor([], dtype=torch.long), 3))


def test_a_chat_says_an_answer_piece_by_piece(folder):
    pipeline = Pipeline.load(folder)
    chat = Chat(pipeline, Image.open(folder / "a.png"))
    pieces = list(chat.ask("word3 word4", Sampling(seed=0), steps=6))
    assert len(pieces) > 1 and "".join(pieces) == "".join(pieces).strip()
    ids = pipeline.words.encode("In: word3 word4\nOut: ")
    again = Dialogue.about(pipeline.model, pipeline.pixels.look([Image.open(folder / "a.png")])[0])
    tokens = list(again.ask(torch.tensor(ids), 6, Sampling(seed=0)))
    assert pipeline.words.decode(tokens) == "".join(pieces)
    with pytest.raises(ValueError, match="form must be one of"):
        Chat(pipeline, Image.open(folder / "a.png"), form="verse")


def test_an_answer_in_a_chat_is_not_a_benchmarks(folder, monkeypatch):
    monkeypatch.setattr(Dialogue, "ask", lambda self, question, steps, sampling: iter([10] * steps))
    chat = Chat(Pipeline.load(folder), Image.open(folder / "a.png"))
    assert len("".join(chat.ask("word1")).split()) == 256


@pytest.fixture
def talk(folder, monkeypatch, capsys):
    """Runs ``omnimamba chat`` on questions; its status, what it printed and what it complained about."""

    def run(*questions: str, options: tuple[str, ...] = ()) -> tuple[int, str, str]:
        asked = iter(questions)

        def line(prompt):
            try:
                return next(asked)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", line)
        status = main(["chat", "--checkpoint", str(folder), "--seed", "1", *options])
        return status, *capsys.readouterr()

    return run


def test_the_terminal_dialogue(folder, talk):
    status, out, err = talk("word1 word2", "", "what", "word5", options=("--image", str(folder / "a.png")))
    assert status == 0
    assert len([text for text in out.splitlines() if text.strip()]) >= 2
    assert "got what in" in err  # a question that cannot be read is told, and the dialogue goes on


def test_a_chat_is_saved_with_what_was_said(folder, tmp_path):
    pipeline, image, path = Pipeline.load(folder), Image.open(folder / "a.png"), tmp_path / "talk"
    chat = Chat(pipeline, image, "plain")
    first = "".join(chat.ask("word3 word4", steps=6))
    early = chat.ask("word7", steps=6)
    heard = next(early)
    early.close()
    chat.save(path)
    again = Chat.load(pipeline, path)
    assert again.turns == chat.turns == [("word3 word4", first), ("word7", heard)] and first and heard
    assert again.form == "plain" and Chat.load(pipeline, path, image, "user").form == "user"
    assert list(again.ask("word5", steps=6)) == list(chat.ask("word5", steps=6))
    assert again.turns == chat.turns and len(again.turns) == 3
    with pytest.raises(ValueError, match="unknown"):
        list(chat.ask("unknown"))
    assert len(chat.turns) == 3  # no turn
    with pytest.raises(ValueError, match="about another picture"):
        Chat.load(pipeline, path, Image.open(folder / "a.png").rotate(180))
    whole = dict(turns="[]", form="null", picture="")
    for change in ({"turns": "[[1, 2]]"}, {"turns": "3"}, {"turns": "["}, {"form": '"verse"'}, {"form": "[]"}):
        chat.dialogue.save(path, whole | change)
        with pytest.raises(CheckpointError, match="without its turns"):
            Chat.load(pipeline, path)
    chat.dialogue.save(path)
    with pytest.raises(CheckpointError, match="without its turns: KeyError"):
        Chat.load(pipeline, path)


def test_the_terminal_dialogue_goes_on(folder, tmp_path, talk):
    """In three sittings as in one; the later ones show what was said."""
    image, kept = ("--image", str(folder / "a.png")), str(tmp_path / "talk")
    questions = ["word1 word2", "word5", "word9 word3"]
    _, whole, _ = talk(*questions, options=image)
    shown = ""
    for question, options in zip(questions, (image, image, ()), strict=True):
        status, out, err = talk(question, "nonsense", options=(*options, "--dialogue", kept))
        assert status == 0 and "got nonsense" in err and out.startswith(shown)
        shown = "".join(f"> {asked}\n{said}\n" for asked, said in Chat.load(Pipeline.load(folder), kept).turns)
        answers = out.splitlines()[:-1]
    assert [line for line in answers if not line.startswith("> ")] == whole.splitlines()[:-1]
    assert talk("word1")[0] == 2  # neither a picture nor a dialogue
    status, _, err = talk("word1", options=("--dialogue", str(tmp_path / "none")))
    assert status == 2 and "--image must name" in err
    status, _, err = talk("word1", options=("--dialogue", str(folder / "a.png")))
    assert status == 2 and "no dialogue's state" in err
    status, _, err = talk("word1", options=(*image, "--dialogue", str(tmp_path / "no" / "talk")))
    assert status == 2 and "make it first" in err  # said before the first question
    assert talk(options=(*image, "--dialogue", str(tmp_path / "new")))[0] == 0
    assert Chat.load(Pipeline.load(folder), tmp_path / "new").turns == []


def test_device_dtype_and_backend_from_the_command_line(folder, tmp_path, capsys):
    common = ["--checkpoint", str(folder), "--device", "cpu", "--dtype", "bfloat16", "--backend", "reference"]
    out = tmp_path / "out.png"
    assert main(["generate", *common, "--prompt", "word1", "--prompt", "word2", "--count", "2", "--out", str(out)]) == 0
    assert Image.open(out).size == (2 * (6 * 32 + 8) - 8, 2 * (4 * 32 + 8) - 8)  # a row a prompt
    assert main(["ask", *common, "--image", str(folder / "a.png"), "--question", "word7", "--format", "plain"]) == 0
    assert main(["ask", *common[:-1], "triton", "--image", str(folder / "a.png"), "--question", "word7"]) == 2
    assert "cannot run" in capsys.readouterr().err
    assert main(["ask", *common[:2], "--device", "tpu", "--image", str(folder / "a.png"), "--question", "word7"]) == 2
    assert json.loads((folder / "config.json").read_text())["model_type"] == "omnimamba"
