"""capture: replayed kernels give the bits of the calls they were recorded from, and nothing else is let in."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import capturing
import pytest
import torch
from common import device_of, same_bits, threads
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from omnimamba_kernels import (
    CannotCapture,
    add_rmsnorm,
    capture,
    lora_linear,
    mamba_mixer_step,
    rmsnorm_fn,
    use_backend,
)
from omnimamba_kernels.capture import _cuda_graph
from omnimamba_kernels.mamba_mixer.cases import SMALL, weights

CASE = SMALL[3]
WIDTH, STATES = 29, ("conv_state", "ssm_state")


class Layer:
    """Norm, projection with adapters, decode step, projection back, residual: weights and states by name."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        make = torch.Generator().manual_seed(1)
        columns = 2 * CASE.extra + CASE.dim + CASE.channels + CASE.h
        shapes = {
            "norm": (WIDTH,), "into": (columns, WIDTH), "down": (2, 3, WIDTH), "up": (2, columns, 3),
            "back": (WIDTH, CASE.extra + CASE.dim), "conv_state": (CASE.b, CASE.channels, CASE.w - 1),
            "ssm_state": (CASE.b, CASE.h, CASE.p, CASE.n),
        }  # fmt: skip
        draw = {name: 0.3 * torch.randn(shape, generator=make) for name, shape in shapes.items()}
        self.own = {k: v.to(dtype) if k in ("into", "down", "up", "back") else v for k, v in draw.items()}
        self.mixer = {k: v.float() for k, v in weights(CASE, torch.float32).items()}

    def states(self) -> list[Tensor]:
        return [self.own[name] for name in STATES]

    def __call__(self, residual: Tensor) -> Tensor:
        t = self.own
        row = rmsnorm_fn(residual, t["norm"], None)
        row = lora_linear(row, t["into"], t["down"], t["up"], scale=2.0, task=1)
        states = {name: t[name] for name in STATES}
        row = mamba_mixer_step(row, **states, **self.mixer, headdim=CASE.p, ngroups=CASE.g)
        return add_rmsnorm(residual, lora_linear(row, t["back"]), t["norm"])


def tokens(count: int) -> list[Tensor]:
    return list(torch.randn(count, CASE.b, WIDTH, generator=torch.Generator().manual_seed(2)))


def native_only(run: str) -> None:
    if not run.startswith("native"):
        pytest.skip("only native kernels are recorded on a CPU")


def recorded_only(run: str) -> None:
    if device_of(run).type != "cuda":
        native_only(run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_replays_give_the_bits_of_the_calls(run, dtype, mode):
    recorded_only(run)
    with mode():
        plain, recorded = Layer(dtype), Layer(dtype)
        replay = capture(recorded, tokens(1)[0], changes=recorded.states())
        for token in tokens(4):
            assert same_bits(replay(token), plain(token.clone()))
            assert all(same_bits(recorded.own[name], plain.own[name]) for name in STATES)


def test_capture_itself_computes_nothing(run):
    recorded_only(run)
    layer, before = Layer(), Layer()
    token = tokens(1)[0]
    replay = capture(layer, token, changes=layer.states())
    assert all(same_bits(layer.own[name], before.own[name]) for name in layer.own)
    assert same_bits(token, tokens(1)[0])
    replay(token)
    assert not same_bits(layer.own["ssm_state"], before.own["ssm_state"])
    assert same_bits(token, tokens(1)[0]), "the input is copied"


def test_outputs_are_not_overwritten_and_values_may_change(run):
    recorded_only(run)
    x, weight = torch.randn(2, 7), torch.randn(5, 7)
    replay = capture(lambda x: lora_linear(x, weight), x)
    first = replay(x)
    kept = first.clone()
    weight.mul_(3)
    second = replay(x)
    assert same_bits(first, kept)
    assert same_bits(second, lora_linear(x, weight))


def test_a_replay_keeps_its_memory_alive(run):
    recorded_only(run)
    layer, plain = Layer(), Layer()
    replay = capture(layer, tokens(1)[0], changes=layer.states())
    del layer
    gc.collect()
    noise = [torch.full((n,), float("nan")) for n in range(1, 400)]
    assert same_bits(replay(tokens(1)[0]), plain(tokens(1)[0])), len(noise)


@pytest.mark.parametrize("rows", [3, 100])
def test_threads_follow_torch_at_every_replay(run, rows):
    """Up to those at capture, when workspaces were made."""
    native_only(run)
    x, weight = torch.randn(rows, 256), torch.randn(300, 256).bfloat16()
    with threads(2):
        replay = capture(lambda x: lora_linear(x, weight), x)
    results = []
    for count in (1, 2, 3, 16):
        with threads(count):
            results.append(replay(x))
    assert all(same_bits(result, results[0]) for result in results)


@pytest.mark.parametrize(
    "function, named",
    [
        (lambda x, w: lora_linear(x, w) + 1, "add"),
        (lambda x, w: lora_linear(x * 2, w), "mul"),
        (lambda x, w: lora_linear(x.double(), w), "_to_copy"),
        (lambda x, w: lora_linear(x, w, backend="reference"), "mm|matmul"),
    ],
)
def test_other_operations_are_refused_by_name(run, function, named):
    native_only(run)
    x, weight = torch.randn(2, 7), torch.randn(5, 7)
    with pytest.raises(CannotCapture, match=named):
        capture(lambda x: function(x, weight), x)
    assert same_bits(lora_linear(x, weight), lora_linear(x, weight.clone())), "kernels run again after a refusal"


def test_another_back_end_cannot_be_captured(run):
    if run.startswith("native") or device_of(run).type == "cuda":
        pytest.skip("these kernels can")
    layer, before, weight = Layer(), Layer(), torch.ones(7)
    # A GPU's kernels are no torch operations: they must be refused where they start.
    named = {
        "triton": "the Triton kernel .* is not a native kernel",
        "cuda": "the CUDA kernel .* is not a native kernel",
    }.get(run.partition("-")[0], "not a native kernel")
    with pytest.raises(CannotCapture, match=named):
        capture(lambda x: rmsnorm_fn(x, weight, None), torch.randn(2, 7))
    with pytest.raises(CannotCapture, match=named):
        capture(layer, tokens(1)[0])
    assert all(same_bits(layer.own[name], before.own[name]) for name in STATES), "a refusal moves no state"


@pytest.mark.parametrize("wrong", [torch.randn(3, 7), torch.randn(2, 7).double()], ids=["shape", "dtype"])
def test_a_replay_wants_the_inputs_it_was_made_for(run, wrong):
    recorded_only(run)
    weight = torch.randn(5, 7)
    replay = capture(lambda x: lora_linear(x, weight), torch.randn(2, 7))
    with pytest.raises(ValueError, match="input 0: got .* as at capture"):
        replay(wrong)


class Graph(TorchDispatchMode):
    """In place of a CUDA graph, on a CPU: the same operations on the same memory, and no Python between them."""

    recording = False

    def __init__(self) -> None:
        super().__init__()
        self.calls: list = []

    def __enter__(self):
        Graph.recording = True
        return super().__enter__()

    def __exit__(self, *error):
        Graph.recording = False
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, found))
        return found

    def replay(self) -> None:
        if Graph.recording:
            raise RuntimeError("Cannot prepare for replay during capturing stage.")
        for function, args, kwargs, found in self.calls:
            for old, new in zip(tree_leaves(found), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def graphs(monkeypatch) -> list[Graph]:
    """The graphs that were made while CPU tensors take the path of a GPU's."""
    made: list[Graph] = []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    places = {
        "CUDAGraph": lambda: made.append(Graph()) or made[-1],
        "graph": lambda graph, stream: graph,
        "device": lambda device: nullcontext(),
        "stream": lambda stream: nullcontext(),
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "set_stream": lambda stream: None,
        "is_current_stream_capturing": lambda: Graph.recording,
    }
    for name, place in places.items():
        monkeypatch.setattr(torch.cuda, name, place)
    return made


@torch.no_grad()
def test_a_graph_replays_the_calls_and_making_it_moves_no_state(graphs):
    with use_backend("reference"):
        plain, recorded, before = Layer(), Layer(), Layer()
        place = torch.empty_like(tokens(1)[0])
        run, output = _cuda_graph(recorded, [place], recorded.states())
        assert all(same_bits(recorded.own[name], before.own[name]) for name in recorded.own)
        for token in tokens(4):
            place.copy_(token)
            run()
            assert same_bits(output, plain(token.clone()))
            assert all(same_bits(recorded.own[name], plain.own[name]) for name in STATES)
    assert len(graphs) == 1


@torch.no_grad()
def test_a_graph_may_become_a_part_of_another(graphs):
    with use_backend("reference"):
        plain, recorded = Layer(), Layer()
        within = torch.empty_like(tokens(1)[0])
        run, output = _cuda_graph(recorded, [within], recorded.states())

        def twice(residual: Tensor) -> Tensor:
            within.copy_(residual)
            run()
            return 2 * output

        place = torch.empty_like(within)
        outer, doubled = _cuda_graph(twice, [place], recorded.states())
        for token in tokens(4):
            place.copy_(token)
            outer()
            assert same_bits(doubled, 2 * plain(token.clone()))
            assert all(same_bits(recorded.own[name], plain.own[name]) for name in STATES)


def test_a_graph_keeps_its_memory_alive(graphs):
    def make():
        weight = torch.ones(3, 7)
        return weakref.ref(weight), _cuda_graph(lambda x: x @ weight.t(), [torch.ones(2, 7)], [])[0]

    weight, run = make()
    graphs.clear()
    run.__self__.graph.calls.clear()  # which a CUDA graph has not
    gc.collect()
    assert weight() is not None
    del run
    gc.collect()
    assert weight() is None


@torch.no_grad()
def test_what_cannot_become_a_graph_is_refused_and_moves_no_state(graphs):
    state, recording = torch.zeros(3), []

    def waits(x):
        state.add_(1)
        recording.append(bool(graphs[-1].calls))
        if recording[-1]:
            raise RuntimeError("operation not permitted when stream is capturing")
        return state + x

    with pytest.raises(CannotCapture, match="cannot be made: operation not permitted"):
        _cuda_graph(waits, [torch.ones(3)], [state])
    assert recording == [False, True], "it runs once, so that all is compiled and loaded, and then is recorded"
    assert not state.any()


def test_a_capture_that_fails_leaves_the_stream_and_the_generator_as_they_were(graphs, monkeypatch):
    here, side = (SimpleNamespace(wait_stream=lambda other: None) for _ in range(2))
    now = capturing.stand_in(monkeypatch, here, Stream=lambda: side)

    def waits(x):
        if now.stream is side:
            raise RuntimeError("operation not permitted when stream is capturing")
        return x

    with pytest.raises(CannotCapture, match="previous error during capture"):
        _cuda_graph(waits, [torch.ones(3)], [])
    assert now.stream is here and now.draws
