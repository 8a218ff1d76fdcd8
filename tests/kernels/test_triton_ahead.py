"""Triton kernels compiled ahead for chips that are not here: no spills, shared memory that fits, matrix units reached.

A representative set: ``python -m omnimamba_kernels.report triton`` compiles every launch of every case.
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from omnimamba_kernels import lora_linear, mamba_chunk_scan_combined
from omnimamba_kernels.backends import OPS
from omnimamba_kernels.lora_linear import cases as lora_cases
from omnimamba_kernels.ssd_scan.cases import PACKED
from omnimamba_kernels.triton_launch import TARGETS, Target, interpreting

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if interpreting():
    pytest.skip("Triton interprets kernels in this process and compiles none", allow_module_level=True)

import triton
import triton.language as tl

from omnimamba_kernels.report import ahead, resources, table
from omnimamba_kernels.report.calls import Call, calls
from omnimamba_kernels.report.resources import _CHIPS, products, resident

KERNELS = Path(ahead.__file__).resolve().parents[1]
WRITTEN = [op for op in OPS if (KERNELS / op / "triton_impl.py").exists()]
LEAST_SHARED = TARGETS["sm_120"].shared_bytes  # that of sm_86 and sm_89 too


def representative(op: str) -> list[ahead.Job]:
    """Of each own kernel the first large bfloat16 launch for every chip, those with float32 and int8 weights too; for
    Hopper the first float32 launch and, where a call without gradients differs, that, and a gated and packed one; for
    the chip with the least the widest heads and states; where float16 is computed as float32, that for the chips with
    the least, and there the states after packed sequences. The same code but for sizes is compiled once."""
    all_calls = list(calls(op))
    large = [call for call in all_calls if call.large]
    large.sort(key=lambda call: not call.name.startswith("1 x "))  # of one row the scan is cut into segments
    chosen = {
        "bf16": ([call for call in large if call.name.endswith("bf16")], TARGETS),
        "fp32": ([call for call in all_calls if not call.large and call.name.endswith("fp32")], ["sm_90"]),
        "inference": ([call for call in large if call.name.endswith("inference, bf16")], ["sm_90"]),
        "fp32 weights": ([call for call in large if call.name.endswith("weight fp32, bf16")], TARGETS),
        "int8": ([call for call in large if call.name.endswith("int8 weights, bf16")], TARGETS),
        "packed": ([call for call in all_calls if call.name == "packed by offsets, inference, fp16"], ["sm_80"]),
        "all at once": ([call for call in large if call.name == "1 x 4096 packed, 64 heads, bf16"], ["sm_90"]),
        "wide": ([call for call in large if call.name == "4 x 4096, 24 heads of 128, 256 states, bf16"], ["sm_120"]),
        "fp16": ([call for call in large if call.name.endswith("fp16") and op == "ssd_scan"], ["sm_80", "sm_120"]),
    }
    found: dict[tuple, ahead.Job] = {}
    for kind, (wanted, archs) in chosen.items():
        for job in ahead.jobs(wanted, archs):
            if job.module.split(".")[1] == op:  # an operation made of others starts their kernels too
                found.setdefault((job.kernel, job.arch, kind), job)
    for job in fullest() if op == "ssd_scan" else ():
        found[job.kernel, job.arch, job.call] = job
    first: dict[tuple, ahead.Job] = {}
    for job in found.values():
        first.setdefault(code(job), job)
    return list(first.values())


def fullest() -> Iterator[ahead.Job]:
    """What needs the most registers of a chip, launch by launch: where a tile or a number of warps more would spill."""
    plain = replace(PACKED, name="packed", gate=False)
    function = lambda **tensors: mamba_chunk_scan_combined(**tensors, **plain.options)  # noqa: E731
    made = Call("ssd_scan", "packed, bf16", True, function, lambda: plain.tensors(torch.bfloat16), ("x", "C"))
    known = {call.name: call for call in (*calls("ssd_scan"), made)}
    wide, all_at_once = "4 x 4096, 24 heads of 128, 256 states", "1 x 4096 packed, 64 heads"
    for name, kernel, *archs in (
        (f"{wide}, fp16", "ssd_walk", "sm_100", "sm_120"),
        (f"{wide}, inference, fp16", "ssd_walk", "sm_100", "sm_120"),
        (f"{all_at_once}, bf16", "ssd_walk", "sm_100"),
        (f"{all_at_once}, bf16", "ssd_back_chunks", "sm_80", "sm_120"),
        ("packed, bf16", "ssd_back_walk", "sm_120"),
        ("packed by offsets, bf16", "ssd_back_walk", "sm_80"),
    ):
        yield from (job for job in ahead.jobs([known[name]], archs) if job.kernel == kernel)


def code(job: ahead.Job) -> tuple:
    """What a kernel's registers, memory and products follow from: all but which numbers 16 divides, and sizes that are
    cut into blocks. Loops run to those; where one is unrolled its blocks are counted by a constant of their own."""
    cut = {name.removeprefix("BLOCK_") for name, _ in job.constants if name.startswith("BLOCK_")}
    constants = [(name, value) for name, value in job.constants if name not in cut]
    kinds = [(name, kind.removesuffix(" 16")) for name, kind in job.kinds]
    return job.kernel, job.arch, (*kinds,), (*constants,), job.options


def _must_spill(reason):
    """Rows that name no version allow what Triton 3.7 spills, and others may spill less."""
    return ahead.of_this_triton(reason) and (reason.startswith("Triton ") or triton.__version__.startswith("3.7."))


def started(op: str) -> set[str]:
    """Names of the kernels that the operation's own files start."""
    files = sorted((KERNELS / op).glob("triton_*.py"))
    calls = [node for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    return {call.args[0].id for call in calls if ast.unparse(call.func) == "launch"}


@pytest.mark.parametrize("op", WRITTEN)
def test_kernels_fit_every_chip(op):
    rows = list(ahead.compile_all(representative(op), processes=1))  # another would import torch and Triton first
    assert {(job.kernel, job.arch) for job, _ in rows} == {*itertools.product(started(op), TARGETS)}
    tight = {job.kernel: found.shared for job, found in rows if job.arch == "sm_80" and found.shared > LEAST_SHARED}
    assert not tight, f"more shared memory than sm_86 and sm_89 have, which go by the rules of sm_80: {tight}"
    broken = {f"{j.kernel} for {j.arch}, {j.call}": faults for j, r in rows if (faults := table.faults(j, r))}
    assert not broken, broken
    spilling = {job.budget() for job, found in rows if found.spilled}
    modules = [importlib.import_module(name) for name in {job.module for job, _ in rows}]
    named = [row for module in modules for row in getattr(module, "SPILLS", ()) if _must_spill(row[4])]
    unused = [row for row in named if row[3:] not in spilling]
    assert not unused, f"nothing spills there any more: {unused}"


def test_few_rows_are_compiled_with_weights_of_every_type():
    few = [job for job in representative("lora_linear") if job.kernel == "few_rows_kernel"]
    for arch in TARGETS:
        types = {dict(job.kinds)["weight"].split()[0] for job in few if job.arch == arch}
        assert types == {"*bf16", "*fp32", "*i8"}


AMPERE = {"sm_86": resources.Chip(48, 16, 102_400, 1024, 65_536, 1, 256),
          "sm_89": resources.Chip(48, 24, 102_400, 1024, 65_536, 1, 256)}  # fmt: skip


@pytest.mark.parametrize("arch", ["sm_86", "sm_89", "sm_120"])
@pytest.mark.parametrize("out", [2048, 8512])
@pytest.mark.parametrize("rank", [16, 32])
def test_few_rows_of_many_ranks_fit_the_chips_with_the_least_shared_memory(arch, out, rank, monkeypatch):
    """Two adapters, whose strip of A lies beside that of the weights."""
    if arch in AMPERE:
        monkeypatch.setitem(TARGETS, arch, Target(arch, 84, LEAST_SHARED))
        monkeypatch.setitem(resources._CHIPS, arch, AMPERE[arch])
    case = lora_cases.Case((1,), 2048, out, rank=rank)
    tensors = lambda: lora_cases.inputs(case, torch.bfloat16, torch.bfloat16)  # noqa: E731
    (job,) = ahead.jobs([Call("lora_linear", "many ranks", True, lora_linear, tensors)], [arch])
    assert job.kernel == "few_rows_kernel"
    assert not table.faults(job, ahead.compile_one(job))


@pytest.mark.parametrize("op", WRITTEN)
def test_an_exception_names_its_reason(op):
    for job in representative(op):
        for allowed, reason in (job.budget(), job.narrower()):
            assert allowed == 0 or len(reason) > 20, f"{job.kernel}, {job.arch}: an exception needs a reason"


def test_an_exception_is_of_its_constants_and_its_version(monkeypatch):
    """The first that fits; the next version's is none of ours."""
    major, minor = triton.__version__.split(".")[:2]
    rows = (
        ("product", "sm_90", {"N": 64}, 1, f"Triton {major}.{int(minor) + 1}: another version's assembler"),
        ("product", "sm_90", {"N": 64}, 2, f"Triton {major}.{minor}: this version's assembler"),
        ("product", "sm_90", {"N": 64, "PRECISION": "ieee"}, 3, "never reached"),
        ("product", "sm_90", {"PRECISION": "ieee"}, 4, "where N is not 64"),
    )
    monkeypatch.setattr(sys.modules[__name__], "SPILLS", rows, raising=False)

    def allowed(arch="sm_90", **constants):
        return ahead.Job("test", "test", False, arch, __name__, "product", (), tuple(constants.items()), ()).budget()[0]

    assert allowed(N=64, PRECISION="ieee") == 2 and allowed(N=32, PRECISION="ieee") == 4
    assert allowed(N=32, PRECISION="tf32") == allowed("sm_80", N=64) == 0


@triton.jit
def product(a, b, c, PRECISION: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision=PRECISION))


@triton.jit
def crowded(a, b, N: tl.constexpr):
    i = tl.arange(0, N)
    values = tl.load(a + i)
    for _ in range(10):
        values = tl.cumsum(values * values, 0)
    tl.store(b + i, values + tl.load(a + i))


def compiled(kernel, arch: str, kinds: dict, options: dict | None = None, **constants):
    job = ahead.Job("test", "test", False, arch, __name__, kernel.__name__, tuple(kinds.items()),
                    tuple(constants.items()), tuple((options or {}).items()))  # fmt: skip
    return job, ahead.compile_one(job)


@pytest.mark.parametrize("arch", TARGETS)
def test_a_product_of_halves_reaches_the_matrix_units(arch):
    kinds = {"a": "*fp16 16", "b": "*fp16 16", "c": "*fp32 16"}
    job, found = compiled(product, arch, kinds, PRECISION="tf32", N=64)
    wanted = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "sm_120": "mma", "gfx942": "mfma"}
    assert found.dots == 1 and set(found.matrix) == {wanted[arch]} and found.registers and not table.faults(job, found)
    assert found.products == {wanted[arch]: 1} and not found.narrower
    broken = {
        "1 of 2 products miss": {"products": {wanted[arch]: 1, "none": 1}},
        "1 products, 0": {"matrix": {}},
        "products are lost": {"products": {}},
        "wgmma takes such tiles": {"narrower": ("64 x 64",)},
    }
    for words, change in broken.items():
        assert words in table.faults(job, replace(found, **change))[0]


def test_a_product_is_known_by_its_layout():
    """In the compiler's own words: one for each unit, plain float32 asked for as such, a tile that wgmma would take."""
    pair = "tensor<64x16xf16, #ttg.dot_op<{{opIdx = 0, parent = {0}}}>> * tensor<16x32xf16, #ttg.dot_op<{{}}>>"
    lines = [
        "#mine = #ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0}>",
        "#plain = #ttg.blocked<{order = [1, 0]}>",
        f"%1 = tt.dot %a, %b, %c : {pair.format('#mine')} -> tensor<64x32xf32, #mine> loc(#loc1)",
        f"%2 = tt.dot %a, %b, %c : {pair.format('#mine')} -> tensor<32x64xf32, #mine>",
        f"%3 = tt.dot %a, %b, %c : {pair.format('#plain')} -> tensor<64x32xf32, #plain>",
        "%4 = tt.dot %a, %b, %c : tensor<64x16xf32, #plain> * tensor<16x32xf32, #plain> -> tensor<64x32xf32, #plain>",
        "%5 = ttng.warp_group_dot %a, %b, %c : !ttg.memdesc<64x16xf16> * !x -> tensor<64x32xf32, #mine>",
        "%6 = ttng.tc_gen5_mma %a, %b, %c, %true, %true : !ttg.memdesc<64x16xf16>",
    ]
    kinds, narrower = products("\n".join(lines), "sm_90", 4)
    assert kinds == {"mma": 2, "none": 1, "wgmma": 1, "tcgen05": 1} and narrower == ("64 x 32",)
    assert products("\n".join(lines), "sm_80", 4)[1] == products("\n".join(lines), "sm_90", 2)[1] == ()


def test_a_product_asked_for_in_plain_float32_need_not():
    kinds = dict.fromkeys("abc", "*fp32 16")
    assert compiled(product, "sm_90", kinds, PRECISION="ieee", N=32)[1].dots == 0
    assert compiled(product, "sm_90", kinds, PRECISION="tf32x3", N=32)[1].dots >= 1


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_a_spill_is_seen(arch):
    limit = {"maxnreg": 24} if arch == "sm_90" else {"waves_per_eu": 8}
    job, found = compiled(crowded, arch, {"a": "*fp32 16", "b": "*fp32 16"}, {"num_warps": 1, **limit}, N=16384)
    assert found.spilled > 0 and "spills" in table.faults(job, found)[0]


def test_shared_memory_beyond_the_chip_is_seen():
    kinds = {"a": "*fp16 16", "b": "*fp16 16", "c": "*fp32 16"}
    job, found = compiled(product, "gfx942", kinds, {"num_warps": 8}, PRECISION="tf32", N=128)
    assert not table.faults(job, found)
    assert "shared memory" in table.faults(job, replace(found, shared=65_537))[0]


def test_a_kernel_that_does_not_compile_is_told_beside_the_others(tmp_path):
    kinds = tuple(dict.fromkeys("ab", "*fp16 16").items()) + (("c", "*fp32 16"),)
    good, bad = (
        ahead.Job("test", "test", False, "gfx942", __name__, "product", kinds, (("PRECISION", p), ("N", 32)), ())
        for p in ("ieee", "tf32x3")
    )
    rows = list(ahead.compile_all([bad, good], 1, tmp_path))
    assert table.faults(*rows[0]) and "input_precision must be one of" in table.faults(*rows[0])[0]
    assert not table.faults(*rows[1]) and len(list(tmp_path.iterdir())) == 1
    assert "does not compile" in table.text(rows) and "mfma" in table.text(rows)


def test_residency():
    hopper, cdna = _CHIPS["sm_90"], _CHIPS["gfx942"]
    assert resident(hopper, 32, 4, 128, 0) == (4, 0.25)
    assert resident(hopper, 32, 4, 32, 0) == (16, 1.0)
    assert resident(hopper, 32, 8, 64, 100 * 1024) == (2, 0.25)
    assert resident(hopper, 32, 8, 255, 0) == (1, 0.125)
    assert resident(cdna, 64, 4, 128, 0) == (4, 0.5)
    assert resident(cdna, 64, 4, 32, 65_536) == (1, 0.125)


def test_the_command_prints_a_table_and_json(tmp_path):
    command = [sys.executable, "-m", "omnimamba_kernels.report", "triton", "--op", "gated_norm", "--large"]
    command += ["--arch", "sm_90", "--kernel", "_forward", "--processes", "1"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "gated_norm  _forward  sm_90" in shown.stdout
    rows = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert rows and all(row["spilled"] == 0 and row["registers"] > 0 for row in rows)
