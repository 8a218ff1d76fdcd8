"""The emulator of csrc/host_gpu itself: layouts against sources of their own, and faults that it must catch."""

import ctypes
import json
import re
import subprocess
import sys
from pathlib import Path

import emulated
import numpy as np
import pytest
import torch

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))

LAYOUTS = json.loads((Path(__file__).parent / "emulator" / "layouts.json").read_text())

# The PTX ISA's own tables: element i of a lane with groupID = lane >> 2 and threadID = lane % 4 lies at
# (groupID + rows[i], 2 threadID + columns[i]); tf32 fragments have threadID + columns[i].
PTX = {
    # "Matrix Fragments for mma.m16n8k16 with floating point type" (9.7.14.5.8 in PTX ISA 8.7)
    "A": {"rows": [0, 0, 8, 8, 0, 0, 8, 8], "columns": [0, 1, 0, 1, 8, 9, 8, 9]},
    "B transposed": {"rows": [0, 0, 0, 0], "columns": [0, 1, 8, 9]},
    "C": {"rows": [0, 0, 8, 8], "columns": [0, 1, 0, 1]},
    # "Matrix Fragments for mma.m16n8k8", .tf32 (9.7.14.5.7)
    "A tf32": {"rows": [0, 8, 0, 8], "columns": [0, 0, 4, 4]},
    "B transposed tf32": {"rows": [0, 0], "columns": [0, 4]},
}


def cute(text):
    """offsets[thread, value] of a printed layout ``((shape of threads), (shape of values)):(strides)``."""
    shape, stride = (eval(part.replace(" ", "")) for part in text.split(":"))

    def offsets(shape, stride):
        if isinstance(shape, int):
            return np.arange(shape) * stride
        found = np.zeros(1, int)
        for s, d in zip(shape, stride, strict=True):  # the first varies fastest
            found = (offsets(s, d)[:, None] + found[None, :]).reshape(-1)
        return found

    return offsets(shape[0], stride[0])[:, None] + offsets(shape[1], stride[1])[None, :]


def ptx(name):
    """(rows, columns), each [lane, element]."""
    lane = np.arange(32)[:, None]
    step = 1 if "tf32" in name else 2
    return lane // 4 + np.array(PTX[name]["rows"]), lane % 4 * step + np.array(PTX[name]["columns"])


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def table(offsets):
    return np.ascontiguousarray(offsets, dtype=np.int32)


def bf16(values):
    """The upper halves of floats that fit."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def whole(*shape, seed=0):
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


@pytest.mark.parametrize("kind, tables, suffix, k", [(0, "mma", "", 16), (1, "mma", "", 16), (2, "tf32", " tf32", 8)])
def test_mma_takes_its_fragments_as_printed(kind, tables, suffix, k):
    """CuTe's tables, PTX's tables and the emulator agree."""
    given = {name: cute(text) for name, text in LAYOUTS[tables].items()}
    for name, rows in (("A", 16), ("B", 8), ("C", 16)):
        row, column = ptx({"A": "A", "B": "B transposed", "C": "C"}[name] + (suffix if name != "C" else ""))
        assert (given[name] == row + rows * column).all(), name
    a, b, c = whole(16, k), whole(k, 8, seed=1), np.full((16, 8), np.nan, np.float32)
    # A and C are numbered m + 16 column, B n + 8 k: the memory of the transposes.
    columns_a, columns_b, columns_c = np.ascontiguousarray(a.T), b.copy(), np.ascontiguousarray(c.T)
    emulated.library().layout_mma(
        kind, *map(pointer, (columns_a, columns_b, columns_c)), *(pointer(table(given[n])) for n in "ABC")
    )
    assert (columns_c.T == a @ b).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_load_matrices_fills_registers_as_printed(count, transposed):
    matrices = np.arange(64 * count, dtype=np.uint16)
    out = np.zeros((32, count), np.uint32)
    emulated.library().layout_load(int(transposed), count, pointer(matrices), pointer(out))
    halves = np.stack([out & 0xFFFF, out >> 16], -1).reshape(32, -1)
    assert (halves == cute(LAYOUTS["ldmatrix"][f"{count} transposed" if transposed else str(count)])).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_store_matrices_takes_registers_as_printed(transposed):
    """The PTX ISA gives stmatrix the fragments of ldmatrix."""
    halves = np.arange(1, 257, dtype=np.uint32).reshape(32, 4, 2)
    registers, matrices = np.ascontiguousarray(halves[..., 0] | halves[..., 1] << 16), np.zeros(256, np.uint16)
    emulated.library().layout_store(int(transposed), pointer(registers), pointer(matrices))
    assert (matrices[cute(LAYOUTS["ldmatrix"]["4 transposed" if transposed else "4"])] == halves.reshape(32, 8)).all()


def swizzle(offset, bits):
    """S<bits, 4, 3> on byte offsets."""
    return offset ^ ((offset >> 7 & (1 << bits) - 1) << 4)


def image_of(matrix, kind, mn_step, k_step):
    """Shared memory that holds (mn, k) in atoms of CuTe's layout ``kind``, which lie mn_step and k_step bytes apart."""
    bits, rows, columns = map(int, re.match(r"S<(\d),4,3> \((\d+),(\d+)\)", LAYOUTS["shared"][kind]).groups())
    mn, k = np.indices(matrix.shape)
    if kind.startswith("K"):
        inside = mn % rows * columns + k * 2 % columns
        atom = mn // rows * mn_step + k * 2 // columns * k_step
    else:
        inside = k % columns * rows + mn * 2 % rows
        atom = mn * 2 // rows * mn_step + k // columns * k_step
    at = swizzle(atom + inside, bits)
    image = np.zeros((int(at.max()) // 1024 + 1) * 512, np.uint16)
    image[at // 2] = bf16(matrix)
    return image


CODES = {"SW128": 1, "SW64": 2, "SW32": 3, "INTER": 0}


@pytest.mark.parametrize("kind", LAYOUTS["shared"])
@pytest.mark.parametrize("n", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("registers", [False, True], ids=["A shared", "A in registers"])
def test_wgmma_reads_and_writes_as_printed(kind, n, registers):
    """Descriptors of every swizzle and major, on memory laid out by CuTe's printed layouts; both operands alike."""
    width = {"SW128": 128, "SW64": 64, "SW32": 32, "INTER": 16}[kind.split("_")[1]]
    mn_major = kind.startswith("MN")
    if mn_major and n * 2 < width:
        pytest.skip("a row of the pattern is wider than the matrix")
    a, b, atom = whole(64, 16), whole(n, 16, seed=1), 8 * width

    def place(matrix):
        """The image, and leading and stride bytes."""
        groups = -(-matrix.shape[0] * 2 // width) if mn_major else 0
        mn_step, k_step = (atom, atom * groups) if mn_major else (atom * (2 if width == 16 else 1), atom)
        if width == 16:  # without a swizzle stride is along m or n and leading along k, whatever the major
            return image_of(matrix, kind, mn_step, k_step), k_step, mn_step
        return image_of(matrix, kind, mn_step, k_step), mn_step if mn_major else 16, k_step if mn_major else mn_step

    image_a, leading_a, stride_a = place(a)
    image_b, leading_b, stride_b = place(b)
    image = np.concatenate([image_a, image_b])
    where = np.array([-1 if registers else 0, 2 * len(image_a), leading_a, stride_a, leading_b, stride_b,
                      CODES[kind.split("_")[1]]], np.int32)  # fmt: skip
    out = np.zeros((128, n // 2), np.float32)
    column_major = np.ascontiguousarray(a.T)
    majors = (2 if mn_major else 0) | (1 if mn_major and not registers else 0)
    emulated.library().layout_wgmma(
        n, majors, pointer(image), image.nbytes, pointer(column_major), pointer(table(cute(LAYOUTS["wgmma"]["A"]))),
        pointer(out), pointer(where),
    )  # fmt: skip
    got = np.zeros(64 * n, np.float32)
    got[cute(LAYOUTS["wgmma"][str(n)])] = out
    assert (got.reshape(n, 64).T == a @ b.T).all()


@pytest.mark.parametrize(
    "case, shape", [("K_SW128, 64 x 64", 64), ("MN_SW128, 64 x 64", 64), ("MN_SW128, 128 x 64", 128)]
)
def test_descriptors_are_those_of_cute(case, shape):
    """The last 16 of 64 k, reached by the step that CuTe's own kernels take."""
    given, kind = LAYOUTS["descriptors"][case], case.split(",")[0]
    b = whole(shape, 64, seed=1)
    mn_step, k_step = (1024, 0) if kind == "K_SW128" else (given["leading"], given["stride"])
    image, a = image_of(b, kind, mn_step, k_step), whole(64, 16)
    where = np.array([-1, 3 * given["step"], 0, 0, given["leading"], given["stride"], 1], np.int32)
    out = np.zeros((128, shape // 2), np.float32)
    emulated.library().layout_wgmma(
        shape, 2 * kind.startswith("MN"), pointer(image), image.nbytes, pointer(np.ascontiguousarray(a.T)),
        pointer(table(cute(LAYOUTS["wgmma"]["A"]))), pointer(out), pointer(where),
    )  # fmt: skip
    got = np.zeros(64 * shape, np.float32)
    got[cute(LAYOUTS["wgmma"][str(shape)])] = out
    assert (got.reshape(shape, 64).T == a @ b[:, 48:].T).all()


@pytest.mark.parametrize("code, kind", [(1, "K_SW128"), (2, "K_SW64"), (3, "K_SW32"), (0, "K_INTER")])
@pytest.mark.parametrize("start", [(0, 0), (8, 5), (-8, 90)], ids=str)
def test_a_bulk_copy_lies_as_printed(code, kind, start):
    bits, _, width = map(int, re.match(r"S<(\d),4,3> \((\d+),(\d+)\)", LAYOUTS["shared"][kind]).groups())
    height, columns, rows = 96, 128, 32
    data = np.zeros(height * columns + 8, np.uint16)
    first = -data.ctypes.data % 16 // 2
    tensor = data[first : first + height * columns].reshape(height, columns)
    tensor[:] = np.arange(1, tensor.size + 1).reshape(tensor.shape)
    out = np.zeros(rows * width, np.uint8)
    emulated.library().layout_box(pointer(tensor), height, columns, rows, width // 2, code, *start, pointer(out))
    padded = np.zeros((height + 2 * rows, columns + 2 * width), np.uint16)
    padded[rows : rows + height, width : width + columns] = tensor
    box = padded[start[1] + rows :][:rows, start[0] + width :][:, : width // 2]
    row, column = np.indices(box.shape)
    assert (out.view(np.uint16)[swizzle(row * width + column * 2, bits) // 2] == box).all()


def test_conversions_round_as_numpy_and_torch_do():
    exact = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    with np.errstate(invalid="ignore"):
        between = np.concatenate([np.nextafter(exact, np.inf), np.nextafter(exact, -np.inf), exact * 1.0004885, exact])
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint32).view(np.float32)
    values = np.ascontiguousarray(np.concatenate([between, bits]), np.float32)
    half, brain = (np.zeros(len(values), np.uint16) for _ in range(2))
    wide = np.zeros(65536, np.float32)
    emulated.library().layout_round(pointer(values), len(values), pointer(half), pointer(brain), pointer(wide))
    with np.errstate(over="ignore", invalid="ignore"):
        assert np.array_equal(half.view(np.float16), values.astype(np.float16), equal_nan=True)
    expected = torch.from_numpy(values).bfloat16()
    assert torch.equal(
        torch.from_numpy(brain.view(np.int16)).view(torch.bfloat16).nan_to_num(7), expected.nan_to_num(7)
    )
    assert np.array_equal(wide, exact, equal_nan=True)


def trial(name, broken, seed, early):
    """0: right, 1: wrong, 2: refused; and the reason."""
    reason = ctypes.create_string_buffer(4000)
    result = emulated.library().trial_run(name.encode(), int(broken), ctypes.c_uint64(seed), int(early), reason, 4000)
    return result, reason.value.decode()


def names():
    if emulated.why_not() is not None:
        return []
    library = emulated.library()
    library.trial_names.restype = ctypes.c_char_p
    return library.trial_names().decode().split()


@pytest.mark.parametrize("name", names())
def test_a_fault_is_caught_and_a_right_kernel_is_not(name):
    """Over ten orders of the threads, copies landing late and at once."""
    runs = [(seed, early) for seed in range(10) for early in (False, True)]
    assert [trial(name, False, *run) for run in runs] == [(0, "")] * len(runs)
    caught = [trial(name, True, *run)[0] != 0 for run in runs]
    assert sum(caught) >= 3, f"caught in {sum(caught)} of {len(runs)} runs"


@pytest.mark.parametrize(
    "name, message",
    [
        ("store_out_of_bounds", r"scale_kernel, block \(2, 0, 0\), thread \(44, 0, 0\): illegal memory access"),
        ("misaligned_pack", r"packs_kernel, block \(0, 0, 0\), thread .*load_pack: the address is no multiple of 16"),
        ("two_operations_at_once", r"shuffle_kernel, block .*thread .*divergence: "),
        ("lane_outside_the_mask", r"shuffle_kernel, block .*thread .*reads lane \d+, which is not in the mask"),
        ("named_barrier_never_full", r"handover_kernel: deadlock: block .*thread \(64, 0, 0\) .* wait for barrier 1"),
        ("ended_before_the_barrier", r"early_end_kernel: deadlock: .*; other threads have ended"),
        ("shared_overrun", r"overrun_kernel, block \(0, 0, 0\): shared memory beside an array was overwritten"),
        ("hopper_no_init", r"product_kernel, block .*thread .*mbarrier: used before mbarrier_init"),
        ("hopper_no_publish", r"product_kernel, block .*thread .*tensor_load: its mbarrier was set up"),
        ("hopper_store_not_fenced", r"double_kernel, block .*thread .*tensor_load: over what thread \d+ has"),
        ("steps_registers_not_fenced", r"steps_kernel, block .*thread .*wgmma: no wgmma_fence\(\) since"),
        ("registers_written", r"registers_kernel, block .*thread .*since the registers of A were written"),
        ("steps_left_out", r"steps_kernel, block .*thread .*a warp of its warpgroup has left out a product"),
        ("steps_not_waited_at_end", r"steps_kernel, block .*thread .*ended before its products were complete"),
        ("hopper_wrong_bytes", r"product_kernel: deadlock: .* wait for mbarrier phase"),
    ],
)
def test_an_error_names_kernel_block_and_thread(name, message):
    result, reason = trial(name, True, 1, False)
    assert result == 2 and re.search(message, reason), reason


@pytest.mark.parametrize("capability, most", [(80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99)])
def test_a_block_has_no_more_shared_memory_than_its_chip(capability, most):
    """In KB, as NVIDIA's programming guide has them."""
    change = emulated.library().omnimamba_emulator_chip
    change(capability)
    try:
        assert trial("more_than_the_chip", False, 1, False) == (0, "")
        result, reason = trial("more_than_the_chip", True, 1, False)
        asked = f"room_kernel: {(most << 10) + 1} bytes of shared memory, of which this chip has {most << 10}"
        assert (result, reason) == (2, asked)
    finally:
        change(80)


def test_the_same_seed_gives_the_same_run():
    for seed in range(5):
        assert trial("hopper_released_too_early", True, seed, False) == trial(
            "hopper_released_too_early", True, seed, False
        )


@pytest.mark.skipif(not emulated.SANITIZED, reason="make test-emulated runs it")
def test_the_sanitizer_stops_at_an_overrun_of_shared_memory_and_names_its_line():
    """In a process of its own, which it ends."""
    code = (
        f"import ctypes; library = ctypes.CDLL({str(emulated.build() / 'emulator_kernels.so')!r}); "
        "library.trial_run(b'shared_overrun', 1, ctypes.c_uint64(1), 0, ctypes.create_string_buffer(4000), 4000)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0, done.stderr
    assert re.search(r"use-after-poison[\s\S]*in overrun_kernel<true> .*trials_sm80.cu:\d+", done.stderr), done.stderr
