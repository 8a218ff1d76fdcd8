"""The process that runs llama.cpp, with an engine of our own in its place: answers, errors, a crash, a hang."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench").is_dir():
    pytest.skip("the benchmarks are not here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import claims, llama_cpp, measure  # noqa: E402
from bench.llama_cpp import LlamaCpp  # noqa: E402
from bench.measure import Bench, Contender, Work  # noqa: E402
from bench.results import Row  # noqa: E402

ENGINE = """
import os, signal, struct, sys, time
from bench.llama_cpp import serve

class Engine:
    vocab = 3

    def reset(self):
        self.taken = []

    def take(self, ids, together):
        if ids == [13]:
            os.kill(os.getpid(), signal.SIGSEGV)
        if ids == [14]:
            time.sleep(60)
        if ids == [15]:
            raise RuntimeError("could not take in 1 tokens")
        self.taken += ids + [together]

    def logits(self):
        return struct.pack("3f", len(self.taken), self.taken[0], self.taken[-1])

assert sys.argv[1:] == ["model.gguf", "16", str(int(sys.argv[3])), "0"]
serve(Engine())
"""


@pytest.fixture
def engine(tmp_path) -> LlamaCpp:
    script = tmp_path / "engine.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{ENGINE}")
    found = LlamaCpp(Path("model.gguf"), 16, command=(str(script),))
    found.reset()
    yield found
    found.close()


def test_ids_in_logits_out(engine):
    engine.take([5, 6])
    engine.take([7], together=False)
    assert engine.logits().tolist() == [[5.0, 5.0, 0.0]]
    engine.reset()
    engine.take([9])
    assert engine.logits().dtype == torch.float32 and engine.logits().tolist() == [[2.0, 9.0, 1.0]]
    with pytest.raises(RuntimeError, match="cannot run: llama.cpp: could not take in 1 tokens"):
        engine.take([15])


class Pedantic:
    extra_info: dict = {}

    def pedantic(self, target, setup, teardown, rounds) -> None:
        for _ in range(rounds):
            setup(), target(), teardown()


class Rates:
    def sample(self, kind: str, nbytes: float = 0) -> float:
        return 100.0


def test_a_crash_while_it_is_timed_becomes_its_row(engine):
    rounds = iter([[5], [5], [13]])
    peer = Contender("peer", lambda: engine.take(next(rounds)), lambda: 0.0, 1.0, expected=2 * measure._LONG)
    ours = Contender("ours", lambda: None, lambda: 0.0, 1.0, expected=2 * measure._LONG)
    mine, theirs = Bench(rates=Rates()).compare(Pedantic(), "g", "c", [ours, peer], Work("read", bytes=1.0))
    assert mine.seconds is not None and mine.reason is None
    assert (theirs.seconds, theirs.reason) == (None, "llama.cpp: died of SIGSEGV")
    with pytest.raises(RuntimeError, match="cannot run: llama.cpp has stopped before"):
        engine.take([5])


def test_a_hang_ends(engine):
    engine.timeout = 0.3
    with pytest.raises(RuntimeError, match="no answer within 0.3 s"):
        engine.take([14])
    assert engine._child is None


@pytest.mark.parametrize(
    ("ratio", "reason", "passed"),
    [(2.1, None, False), (2.1, "llama.cpp: died of SIGILL", None), (1.3, "llama.cpp: died of SIGILL", False)],
)
def test_the_claim_says_what_of_it_was_not_timed_and_is_not_met_without_it(ratio, reason, passed):
    """The reordered one is the faster here."""
    timed = dict(times_ours=ratio, rounds=3, seconds=1.0)
    rows = [
        Row("130M decode", "int8 weights", "llama-cpp-python 1, Q8_0", **timed),
        Row("130M decode", "int8 weights", "llama-cpp-python 1, Q8_0, reordered",
            **({"reason": reason} if reason else timed | {"times_ours": 1.3})),
    ]  # fmt: skip
    (claim,) = [c for c in claims._model(rows) if "Q8_0" in c.what]
    assert claim.measured == (f"{ratio}x; reordered: not timed, llama.cpp: died of SIGILL" if reason else "1.3x")
    assert claim.passed is passed


def test_without_the_package_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="cannot run: llama-cpp-python is not installed"):
        LlamaCpp(Path("model.gguf"), 16)


def test_what_mends_it_is_said_in_the_same_words_and_for_the_version_that_is_pinned():
    (pin,) = re.findall(r"^llama-cpp-python==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    line = (
        'CXXFLAGS="-include $PWD/bench/llama_cpp_amx.h" .venv/bin/pip install --no-cache-dir --force-reinstall '
        f'--no-deps "llama-cpp-python=={pin}"'
    )
    for name, before in (("README.md", ""), ("bench/llama_cpp_amx.h", "// ")):
        assert f"\n{before}{line}\n" in (ROOT / name).read_text(), name
