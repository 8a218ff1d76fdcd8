"""Batches made by a thread: made early, taken in order, counted when they are learned, gone when the run is over."""

import json
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from runs import losses, until, written

from omnimamba_model import OmniMamba, load
from omnimamba_model.training import checkpoints
from omnimamba_model.training.ahead import Ahead, ahead
from omnimamba_model.training.features import FeatureCache, look_at
from omnimamba_model.training.lessons import Drawing, Lesson, Understanding, Unprepared
from omnimamba_model.training.loop import Trainer
from omnimamba_model.training.phase import Phase
from omnimamba_model.training.records import BadRecord, NoneUsable, open_records
from omnimamba_model.training.run import run
from omnimamba_model.training.settings import read

ROOT = Path(__file__).resolve().parents[3]


class Watched(Lesson):
    """Batch i is record i of each epoch; what is made, and in which thread, is noted. Record ``bad`` is an error."""

    def __init__(self, count=100, bad=None, gate=None):
        super().__init__(list(range(count)), 1)
        self.bad, self.gate, self.made, self.threads = bad, gate, [], set()

    def make(self, place, over=lambda: False):
        try:
            return super().make(place, over)
        finally:
            self.made.append(place)
            self.threads.add(threading.current_thread())

    def example(self, record, draw):
        if self.gate is not None:
            self.gate.wait(60)
        if record % 3 == 0:
            raise BadRecord(f"record {record}")
        if record == self.bad:
            raise RuntimeError(f"no way with {record}")
        return record

    def join(self, rows):
        return "text", {"ids": torch.tensor(rows)}


def test_the_same_batches_and_counts_made_before_they_are_asked_for():
    plain, watched = Watched(), Watched()
    made = Ahead(watched, depth=3, end=20)
    for place in range(20):
        (_, found), (_, expected), far = made(place), plain(place), list(range(min(place + 4, 20)))
        assert torch.equal(found["ids"], expected["ids"])
        assert until(lambda far=far: watched.made == far)
        assert watched.passed_over == plain.passed_over, "nothing is counted ahead"
    assert plain.passed_over and threading.current_thread() not in watched.threads
    made.close()
    assert len(watched.threads) == 1 and not any(thread.is_alive() for thread in watched.threads)


def test_another_place_than_the_next_is_made_as_well():
    watched, plain = Watched(), Watched()
    made = Ahead(watched, depth=2, end=50)
    for place in (0, 1, 7, 8, 3, 49, 50):
        assert torch.equal(made(place)[1]["ids"], plain(place)[1]["ids"])
    assert watched.passed_over == plain.passed_over
    made.close()


def test_an_error_comes_with_its_own_batch():
    order = [int(Watched()(place)[1]["ids"]) for place in range(20)]
    watched = Watched(bad=order[12])
    made = Ahead(watched, depth=4, end=100)
    first = order.index(order[12])
    for place in range(first):
        made(place)
    assert until(lambda: first in watched.made)
    with pytest.raises(RuntimeError, match=f"no way with {order[12]}"):
        made(first)
    made.close()


def test_the_end_of_a_run_does_not_wait_for_whole_batches():
    """The thread is within a record when the run is interrupted, and would have ten thousand to go."""
    gate = threading.Event()
    watched = Watched(gate=gate)
    watched.mine = slice(0, 10_000)
    trainer = type("", (), {"phase": Phase("", "base", ("text",), 9, 1e-3), "lessons": {"text": watched}})()
    trainer.prefetch = 2
    begun = []
    with pytest.raises(KeyboardInterrupt), ahead(trainer):
        taken = trainer.ahead["text"]
        waiting = threading.Thread(target=lambda: begun.append(pytest.raises(CancelledError, taken, 0)))
        waiting.start()
        assert until(lambda: taken._waiting)
        threading.Timer(0.2, gate.set).start()
        raise KeyboardInterrupt
    waiting.join(60)
    assert begun and trainer.ahead == {} and watched.made == [0]
    assert not any(thread.is_alive() for thread in watched.threads)


def test_no_lesson_waits_for_another_to_be_told_that_the_run_is_over():
    """One thread is within a record for as long as the other lesson has not been told."""
    lessons, told, within = {"a": Watched(), "b": Watched()}, [], threading.Event()
    trainer = type("", (), {"phase": Phase("", "base", ("a", "b"), 9, 1e-3), "lessons": lessons, "prefetch": 2})()

    class Gate:
        def wait(self, _):
            if lessons["a"].made:  # the first batch is to be taken
                within.set()
                told.append(until(other._over.is_set, 10))

    lessons["a"].gate = Gate()
    with ahead(trainer):
        other = trainer.ahead["b"]
        trainer.ahead["a"](0)
        assert within.wait(60)
    assert told and all(told)


def test_a_run_is_the_same_however_far_ahead(values, data, tmp_path):
    """Bit for bit, through a stop, with accumulation and dropout; kept counts do not know what was made ahead."""
    (data / "3.png").write_bytes(b"no picture")
    values |= {"accumulate": 2, "save_every": 1, "keep": 9, "fresh": values["fresh"] | {"lora_dropout": 0.3}}
    run(written(tmp_path / "s.yaml", values | {"out": str(tmp_path / "plain"), "prefetch": 0}), print)
    taken = Trainer.step

    def step(self):
        if self.done == 3:
            raise KeyboardInterrupt
        return taken(self)

    for depth, raises in ((5, True), (1, False)):
        settings = written(tmp_path / "s.yaml", values | {"prefetch": depth})
        with pytest.MonkeyPatch.context() as patch:
            if raises:
                patch.setattr(Trainer, "step", step)
            with pytest.raises(KeyboardInterrupt) if raises else nullcontext():
                run(settings, print)
    assert losses(values["out"]) == losses(tmp_path / "plain") and losses(values["out"])[-1]["passed over"]
    pairs = zip(checkpoints.kept(Path(values["out"])), checkpoints.kept(tmp_path / "plain"), strict=True)
    for (_, a), (_, b) in pairs:
        found, expected = (torch.load(place / "trainer.pt", weights_only=True)["passed over"] for place in (a, b))
        assert found == expected
    found, expected = (load(Path(out) / "model").state_dict() for out in (values["out"], tmp_path / "plain"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_interrupted_from_the_keyboard_it_tells_and_goes_on(values, data, tmp_path):
    for i in range(1, 7):
        (data / f"{i}.png").write_bytes(b"no picture")
    values |= {"steps": 400, "save_every": 1, "keep": 1}
    path = tmp_path / "s.yaml"
    settings = written(path, values)
    command = [sys.executable, "-m", "omnimamba_model", "train", str(path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert until(lambda: checkpoints.kept(Path(values["out"])), 300)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in told, told
    *_, reason, stopped, last = told.strip().splitlines()
    assert "\npassed over " in told and reason.endswith(".png is no picture") and last == "interrupted"
    assert stopped.startswith("stopped after step ")
    step = checkpoints.kept(Path(values["out"]))[-1][0]
    assert step < 400 and stopped.endswith(f"the same command goes on after {step}")
    told = Path(values["out"]) / "settings.json"
    told.write_text(json.dumps(json.loads(told.read_text()) | {"steps": step + 2}))  # the same run, sooner over
    path.write_text(yaml.safe_dump(values | {"steps": step + 2}))
    said = []
    run(read(path), said.append)
    assert f"going on after step {step}" in said and len(losses(settings.out)) == step + 3


def test_a_real_lesson_knows_nothing_of_it(data, config, words):
    lesson = Drawing(open_records([data / "t2i.jsonl"])[0], 4, config, words, seed=5)
    made = Ahead(Drawing(lesson.records, 4, config, words, seed=5), 2, 9)
    for place in range(9):
        (_, a), (_, b) = made(place), lesson(place)
        assert all(torch.equal(a[name], b[name]) for name in b)
    made.close()


class Late(Watched):
    """Its batch 1 cannot be made before ``prepare``, which helps or does not; batch 2 takes its time."""

    def __init__(self, helps):
        super().__init__()
        self.helps, self.ready, self.within, self.seen, self.begun = helps, False, False, [], threading.Event()

    def make(self, place, over=lambda: False):
        if not self.ready and place == 1:
            raise Unprepared
        if not self.ready and place == 2:
            self.within = True
            self.begun.set()
            time.sleep(0.3)
            self.within = False
        return super().make(place, over)

    def prepare(self):
        self.seen.append(self.within)
        self.ready = self.helps


@pytest.mark.parametrize("helps", [True, False])
def test_what_is_loaded_is_loaded_once_and_nothing_is_made_meanwhile(helps):
    late, plain = Late(helps), Watched()
    made = Ahead(late, depth=2, end=9)
    assert torch.equal(made(0)[1]["ids"], plain(0)[1]["ids"]) and late.begun.wait(60)
    if helps:
        assert all(torch.equal(made(place)[1]["ids"], plain(place)[1]["ids"]) for place in range(1, 9))
    else:
        with pytest.raises(Unprepared):
            made(1)
    made.close()
    assert late.seen == [False]


@pytest.mark.parametrize("way", ["by itself", "ahead"])
def test_why_no_record_can_be_used_is_counted(way):
    lesson = Watched()
    lesson.example = lambda record, draw: (_ for _ in ()).throw(BadRecord(f"one of {record % 2}"))
    made = lesson if way == "by itself" else Ahead(lesson, depth=2, end=9)
    with pytest.raises(NoneUsable, match="none of 100 records can be used, for example: one of"):
        made(0)
    assert lesson.passed_over == {"one of 0": 50, "one of 1": 50}
    if made is not lesson:
        made.close()
    with pytest.raises(NoneUsable) as told:
        raise pickle.loads(pickle.dumps(NoneUsable.of(3, lesson.passed_over)))
    assert told.value.passed_over == lesson.passed_over and str(told.value).startswith("none of 3")


class Encoders:
    """Patches as what is loaded before it looks; the threads that did either are noted."""

    def __init__(self, pixels):
        self.pixels, self.ready, self.loaded, self.looked = pixels, False, [], []

    def prepare(self):
        self.loaded.append(threading.current_thread())
        self.ready = True

    def look(self, images):
        assert self.ready
        self.looked.append(threading.current_thread())
        return self.pixels.look(images)


@pytest.mark.parametrize("kept", [None, 0, 3, 6], ids=["no cache", "an empty one", "a part", "all"])
def test_encoders_are_loaded_by_the_main_thread_where_one_is_needed(data, config, words, pixels, tmp_path, kept):
    """A picture that is none needs no encoder; what waits is as narrow as the cache, and the model makes the same of
    it as of the same numbers in fp32."""
    (data / "6.png").write_bytes(b"no picture")
    for i in range(kept or 0):
        picture = data / f"{i}.png"
        with Image.open(picture) as image:
            features = look_at(image, pixels.look)
        FeatureCache(tmp_path / "cache", "patches").get(picture.read_bytes(), lambda features=features: features)
    records, encoders = open_records([data / "mmu.json"])[0], Encoders(pixels)
    caches = [None if kept is None else FeatureCache(tmp_path / name, "patches") for name in ("cache", "plain")]
    lesson, plain = (
        Understanding(records, 2, config, words, eyes, images=data, text_length=24, seed=1, cache=cache)
        for eyes, cache in zip((encoders, pixels), caches, strict=True)
    )
    made, model = Ahead(lesson, 2, 12), OmniMamba(config)
    for place in range(12):
        (_, found), (_, expected) = made(place), plain(place)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert found["features"].dtype == (torch.float32 if kept is None else torch.float16)
        assert lesson.passed_over == plain.passed_over
    made.close()
    assert not lesson.threaded and plain.passed_over
    assert encoders.loaded == ([] if kept == 6 else [threading.current_thread()])
    assert threading.current_thread() not in encoders.looked and bool(encoders.looked) == (kept != 6)
    wide = found | {"features": found["features"].float()}
    assert torch.equal(model("mmu", **found).loss, model("mmu", **wide).loss)
