"""lora_linear in a CUDA graph: the host never waits for a number, and a replay routes by the tasks of its moment."""

from __future__ import annotations

import pytest
import torch
from common import device_of, same_bits
from counting import Seen

from omnimamba_kernels import capture, checks, lora_linear
from omnimamba_kernels.lora_linear.cases import Case, inputs, int8_inputs

CASES = (Case((4,), 256, 136, rank=8, bias=True), Case((4,), 256, 136, rank=40), Case((80,), 256, 136, rank=8))
"""Few rows in one launch and, of many ranks, in two; many rows."""


def weights(case: Case, int8: bool) -> dict:
    t = int8_inputs(case, torch.bfloat16) if int8 else inputs(case, torch.bfloat16, torch.bfloat16)
    return {name: value for name, value in t.items() if name not in ("x", "task")}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
def test_a_replay_follows_the_tasks(run, case, int8):
    if device_of(run).type != "cuda":
        pytest.skip("a CUDA graph needs a GPU")
    held = weights(case, int8)
    rows = [inputs(case, torch.bfloat16, torch.bfloat16, seed) for seed in (1, 2, 3)]
    assert not torch.equal(rows[0]["task"], rows[1]["task"])
    function = lambda x, task: lora_linear(x, **held, task=task, scale=2.0)  # noqa: E731
    replay = capture(function, rows[0]["x"], rows[0]["task"])
    with torch.no_grad():
        for each in rows:
            assert same_bits(replay(each["x"], each["task"]), function(each["x"], each["task"]))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
def test_the_host_makes_memory_and_starts_kernels_alone(run, case, int8, monkeypatch):
    """Reading a number back (torch's _local_scalar_dense) would wait for the GPU, which a capture forbids."""
    if not run.startswith(("cuda", "triton")):
        pytest.skip("it is for kernels of a GPU")
    monkeypatch.setattr(checks, "in_range", lambda *_: None)  # of a GPU's tensors it reads nothing
    t = weights(case, int8) | {name: inputs(case, torch.bfloat16, torch.bfloat16)[name] for name in ("x", "task")}
    t["x"].requires_grad_(), t["lora_B"].requires_grad_()
    memory = {"empty", "new_empty", "empty_like", "empty_strided", "fill_", "full", "detach", "_to_copy", "clone"}
    memory |= {"clamp"} if run == "triton" else set()  # tasks of 64 bits are cut to 32
    with Seen() as seen:
        y = lora_linear(**t, scale=2.0)
        y.backward(torch.empty_like(y))
        lora_linear(**(t | {"task": 1}), scale=2.0)
    assert seen.names <= memory, seen.names - memory
