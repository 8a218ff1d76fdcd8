"""What every kernel test stands on: the runs to repeat, the budget rule, framed memory, thread counts.

The budget rule is the only tolerance of these tests. An oracle written in the test runs in float64 on the very inputs
that the kernel gets; the reference runs in the kernel's own precision. The kernel's error may be twice the reference's,
plus one rounding of the storage type and of float32.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import emulated
import hypothesis
import pytest
import torch
from answers import once
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode_temporarily
from torch.utils._device import _device_constructors

from omnimamba_kernels import backends, native, triton_launch, use_backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WITHOUT_VNNI = "-without-vnni"
WITHOUT_AMX = "-without-amx"
"""End the name of a run on AVX-512 as it is on a processor without VNNI, or without matrix registers."""
THREAD_COUNTS = (1, 1, 2, 3)
"""At how many threads of the CPU, once more at the first, a run must give the same bits."""


def runs(op: str | None = None) -> list[str]:
    """Every back end that can run here, the native one once for each instruction set of this processor.

    The emulator runs the kernels for any chip and, for an operation that has its own for Hopper, those once more.
    """
    found = []
    for name, reason in backends().items():
        if reason is not None:
            continue
        if name == "native":
            found += [f"native-{isa}" for isa, why in native.instruction_sets().items() if why is None]
        else:
            found.append(name)
    if emulated.why_not():
        return found
    hopper = op is not None and any((emulated.ROOT / "csrc" / op).glob("cuda_sm90*.cu"))
    return [*found, "cuda-emulated", *["cuda-emulated90"] * hopper]


def device_of(run: str) -> torch.device:
    """Where the tensors of a run live: a GPU if its kernels are a GPU's and there is one."""
    on_gpu = run in ("triton", "cuda") and torch.cuda.is_available() and not triton_launch.interpreting()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


class _Placing(TorchFunctionMode):
    """Tensors made without a device go to ``device``, with the values that the CPU's generators give."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        elsewhere = self.device != here()  # the device of an inner block
        if function not in _device_constructors() or elsewhere or (kwargs or {}).get("device") is not None:
            return made
        return made.detach().to(self.device).requires_grad_(made.requires_grad)


_places: list[torch.device] = []


@contextmanager
def placing(device: torch.device) -> Iterator[None]:
    """Within the block new tensors live on ``device``."""
    _places.append(device)
    try:
        with _Placing(device) if torch.cuda.is_available() else nullcontext():
            yield
    finally:
        _places.pop()


def here() -> torch.device:
    """Where new tensors are placed."""
    return _places[-1] if _places else torch.device("cpu")


def moved(t: Any) -> Any:
    """A tensor as a leaf of the device where new ones are placed; anything else as it is."""
    if not isinstance(t, Tensor) or t.device == here():
        return t
    return t.detach().to(here()).requires_grad_(t.requires_grad)


@contextmanager
def not_placing() -> Iterator[None]:
    """Within the block ``placing`` is suspended: torch.compile cannot trace everything through it."""
    with _pop_mode_temporarily() if _get_current_function_mode() else nullcontext():
        yield


@contextmanager
def running(run: str) -> Iterator[None]:
    """Within the block the public functions run on ``run``, one of ``runs()``; what a kernel cannot take is skipped."""
    name, _, isa = run.partition("-")
    with ExitStack() as stack:
        stack.enter_context(use_backend(name))
        if isa.startswith("emulated"):
            stack.enter_context(emulated.emulated(int(isa.removeprefix("emulated") or 80)))
        elif isa:
            stack.enter_context(native.use_instruction_set(isa.removesuffix(WITHOUT_VNNI).removesuffix(WITHOUT_AMX)))
            if isa.endswith(WITHOUT_VNNI):
                stack.enter_context(native.without_vnni())
            if isa.endswith(WITHOUT_AMX):
                stack.enter_context(native.without_amx())
        try:
            yield
        except RuntimeError as error:
            skip_if_not_offered(error)
            raise


def skip_if_not_offered(error: BaseException) -> None:
    """Skips the test that asked for a kernel not written yet, or the hypothesis example that interprets bfloat16."""
    if triton_launch.NO_BFLOAT16 in str(error):
        if hypothesis.currently_in_test_context():
            hypothesis.reject()
        pytest.skip(triton_launch.NO_BFLOAT16)
    missing = re.search(r"this version of omnimamba has no \w+ kernel of \w+", str(error))
    if missing is not None:
        pytest.skip(missing[0])


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def hostile_memory() -> Iterator[None]:
    """Within the block memory from ``empty`` is full of NaN, or of the largest integer."""
    change = torch._C._set_deterministic_algorithms  # the public function imports torch's compiler to tell it as well
    before = torch.are_deterministic_algorithms_enabled()
    change(True, warn_only=torch.cuda.is_available())  # cuBLAS would ask for a variable
    try:
        yield
    finally:
        change(before)


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal to the last bit, NaN and the sign of zero included."""
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.detach().view(bits), b.detach().view(bits))


def evaluate(
    function: Callable[..., Tensor | tuple],
    tensors: Mapping[str, Tensor | None],
    wanted: tuple[str, ...] = (),
    seed: int = 7,
) -> dict[str, Tensor]:
    """Calls ``function(**tensors)`` and names what comes out: "out 0", "out 1", and "grad NAME" for each of ``wanted``.

    The gradients are those of a sum of the outputs, each element times one of ``weights``.
    """
    leaves = {
        name: t.detach().requires_grad_() if t is not None and name in wanted else t for name, t in tensors.items()
    }
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = {f"out {i}": out.detach() for i, out in enumerate(outputs)}
    present = [name for name in wanted if leaves[name] is not None]
    if present:
        grads = torch.autograd.grad(outputs, [leaves[name] for name in present], weights(outputs, seed))
        found |= {f"grad {name}": grad for name, grad in zip(present, grads, strict=True)}
    return found


def weights(outputs: Iterable[Tensor], seed: int = 7) -> list[Tensor]:
    """Fixed random numbers, the same in every precision, for the outputs to be summed with."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(out.shape, generator=generator).bfloat16().to(out) for out in outputs]


def assert_within_budget(name: str, got: Tensor, low: Tensor, exact: Tensor) -> None:
    """The budget rule: ``low`` is the reference's answer in ``got``'s precision, ``exact`` the oracle's in float64."""
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    assert got.dtype == low.dtype, f"{name}: {got.dtype}, expected {low.dtype}"
    if not exact.numel():
        return
    storage = torch.finfo(got.dtype).eps
    got, low = got.double(), low.double()
    assert torch.isfinite(exact).all(), f"{name}: the oracle itself is not finite"
    assert torch.isfinite(got).all(), f"{name}: {int((~torch.isfinite(got)).sum())} elements are not finite"
    budget = 2 * (low - exact).abs().max() + storage * exact.abs() + torch.finfo(torch.float32).eps * exact.abs().max()
    error = (got - exact).abs()
    worst = int((error - budget).argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), exact.shape))
    assert (error <= budget).all(), (
        f"{name}{at}: got {got.flatten()[worst]:.9g}, exact {exact.flatten()[worst]:.9g}, "
        f"error {error.flatten()[worst]:.3g}, allowed {budget.flatten()[worst]:.3g}"
    )


def check(
    run: str,
    function: Callable[..., Tensor | tuple],
    oracle: Callable[..., Tensor | tuple],
    tensors: Mapping[str, Tensor | None],
    wanted: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """``function`` on ``run`` against ``oracle`` in float64, outputs and gradients, under the budget rule.

    The reference and the oracle run on the CPU.
    """
    with running(run):
        got = evaluate(function, tensors, wanted)
    tensors = {name: t if t is None else t.cpu() for name, t in tensors.items()}
    with placing(torch.device("cpu")):
        with running("reference"):
            low = once(evaluate, function, tensors, wanted)
        exact = once(evaluate, oracle, {name: double(t) for name, t in tensors.items()}, wanted)
    assert got.keys() == low.keys() == exact.keys()
    for name in got:
        assert got[name].device == device_of(run)
        assert_within_budget(name, got[name].cpu(), low[name], exact[name])
    return got


def double(t: Tensor | None) -> Tensor | None:
    return t.double() if t is not None and t.is_floating_point() else t


@dataclass
class Framed:
    """A tensor inside a larger buffer whose other elements are canaries."""

    tensor: Tensor
    _buffer: Tensor
    _outside: Tensor
    _before: Tensor

    def intact(self) -> bool:
        """Whether no canary was overwritten."""
        return same_bits(self._buffer[self._outside], self._before)


def framed(values: Tensor, order: tuple[int, ...] | None = None, margin: int = 3) -> Framed:
    """``values`` as a view with ``margin`` canaries (NaN, or a wild integer) around it along every dimension.

    ``order`` names the dimensions from the slowest in memory to the fastest, as in ``permute``: (0, 2, 1) makes
    (b, d, l) channel-last.
    """
    order = order or tuple(range(values.dim()))
    canary = float("nan") if values.is_floating_point() else -(2**30)
    buffer = torch.full([values.shape[i] + 2 * margin for i in order], canary, dtype=values.dtype)
    inside = tuple(slice(margin, margin + values.shape[i]) for i in order)
    outside = torch.ones(buffer.shape, dtype=torch.bool)
    outside[inside] = False
    back = [order.index(i) for i in range(values.dim())]
    view = buffer[inside].permute(back)
    view.copy_(values)
    return Framed(view, buffer, outside, buffer[outside].clone())
