"""The Triton kernels of the gated RMSNorm. For each row and each group of GROUP neighbouring values, with s = silu(z):

    u = x or x s,  r = 1 / sqrt(mean(u^2) + eps),  v = u r weight + bias,  y = v s or v

    dv = dy s or dy,  dn = dv weight,  du = r (dn - u r^2 mean(dn u))
    gate after:   dx = du,    dz = dy v silu'(z)
    gate before:  dx = du s,  dz = du x silu'(z)
    dweight = sum over rows of dv u r,  dbias = sum over rows of dv

Shapes: x, z, dy (outer, inner, d) with contiguous columns; y, dx, dz (M, d) contiguous, M = outer inner rows.
Plan: a program has BLOCK_M rows of one group, their first BLOCK_D columns in registers; further columns, which only a
  long group has, are read twice. Backward: a program walks over its part of the rows, reads each twice, the second time
  from the cache, and keeps its share of dweight and dbias in registers, or of a long group in its own row of ``sums``;
  a second launch adds the parts, always in the same order, and rounds them to the weight's and the bias's type.
Traffic: M d elements, 3 times forward (2 without z), 5 times backward (3); 8 d bytes a part, 16 with a bias.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_launch
from ..triton_launch import launch, together


@triton.jit
def _load(rows, col, inside):
    return tl.load(rows + col, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _gate(z, col, inside):
    """silu(z) and its slope."""
    z = _load(z, col, inside)
    s = tl.sigmoid(z)
    return z * s, s * (1 + z * (1 - s))


@triton.jit
def _read(x, z, col, inside, GATE_BEFORE: tl.constexpr):
    """A block of u."""
    u = _load(x, col, inside)
    if GATE_BEFORE:
        u *= _gate(z, col, inside)[0]
    return u


@triton.jit
def _write(u, r, z, weight, bias, y, col, inside, known, GATE_AFTER: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Normalises a block of u and stores its y."""
    v = u * r * _load(weight, col, known)
    if HAS_BIAS:
        v += _load(bias, col, known)
    if GATE_AFTER:
        v *= _gate(z, col, inside)[0]
    tl.store(y + col, v.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _forward(
    x, z, weight, bias, y, M, inner, d, eps, x_outer, x_inner, z_outer, z_inner,
    GROUP: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    GATE_BEFORE: tl.constexpr = HAS_Z and not NORM_BEFORE_GATE
    GATE_AFTER: tl.constexpr = HAS_Z and NORM_BEFORE_GATE
    groups = d // GROUP
    first = tl.program_id(0) % groups * GROUP
    row = (tl.program_id(0) // groups).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    col = tl.arange(0, BLOCK_D)[None, :]
    x += row // inner * x_outer + row % inner * x_inner + first
    if HAS_Z:
        z += row // inner * z_outer + row % inner * z_inner + first
    if HAS_BIAS:
        bias += first
    y += row * d + first
    weight += first

    known = col < GROUP
    inside = known & (row < M)
    u = _read(x, z, col, inside, GATE_BEFORE)
    squares = tl.sum(u * u, 1, keep_dims=True)
    for start in range(BLOCK_D, GROUP, BLOCK_D):
        more = col + start
        u_more = _read(x, z, more, (more < GROUP) & (row < M), GATE_BEFORE)
        squares += tl.sum(u_more * u_more, 1, keep_dims=True)

    r = tl.rsqrt(squares / GROUP + eps)
    _write(u, r, z, weight, bias, y, col, inside, known, GATE_AFTER, HAS_BIAS)
    for start in range(BLOCK_D, GROUP, BLOCK_D):
        more = col + start
        known = more < GROUP
        inside = known & (row < M)
        u_more = _read(x, z, more, inside, GATE_BEFORE)
        _write(u_more, r, z, weight, bias, y, more, inside, known, GATE_AFTER, HAS_BIAS)


@triton.jit
def _read_gradient(x, z, weight, dy, col, inside, known, HAS_Z: tl.constexpr):
    """Blocks of x, dy and weight, of the gate and its slope."""
    gate, slope = 1.0, 0.0
    if HAS_Z:
        gate, slope = _gate(z, col, inside)
    return _load(x, col, inside), _load(dy, col, inside), _load(weight, col, known), gate, slope


@triton.jit
def _add(sums, rows, known, is_first):
    """Adds the sum of ``rows`` to memory of this program alone; the barriers order its own threads."""
    tl.debug_barrier()
    before = tl.load(sums, mask=known & (not is_first), other=0.0)
    tl.debug_barrier()
    tl.store(sums, before + tl.sum(rows, 0, keep_dims=True), mask=known)


@triton.jit
def _backward(
    x, z, weight, bias, dy, dx, dz, sums, M, inner, d, eps, part_rows,
    x_outer, x_inner, z_outer, z_inner, dy_outer, dy_inner,
    GROUP: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    GATE_BEFORE: tl.constexpr = HAS_Z and not NORM_BEFORE_GATE
    GATE_AFTER: tl.constexpr = HAS_Z and NORM_BEFORE_GATE
    groups = d // GROUP
    first = tl.program_id(0) % groups * GROUP
    part = (tl.program_id(0) // groups).to(tl.int64)
    weight += first
    if HAS_BIAS:
        bias += first
    sums += part * (2 if HAS_BIAS else 1) * d + first

    if GROUP <= BLOCK_D:
        dweight = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        dbias = tl.zeros((BLOCK_M, BLOCK_D), tl.float32) if HAS_BIAS else None
    begin = part * part_rows
    for m in range(begin, tl.minimum(begin + part_rows, M), BLOCK_M):
        row = m + tl.arange(0, BLOCK_M)[:, None]
        outer_row, inner_row = row // inner, row % inner
        x_rows = x + outer_row * x_outer + inner_row * x_inner + first
        z_rows = z + outer_row * z_outer + inner_row * z_inner + first if HAS_Z else z
        dy_rows = dy + outer_row * dy_outer + inner_row * dy_inner + first
        dx_rows = dx + row * d + first
        dz_rows = dz + row * d + first if HAS_Z else dz

        squares = tl.zeros((BLOCK_M, 1), tl.float32)
        products = tl.zeros((BLOCK_M, 1), tl.float32)
        for start in range(0, GROUP, BLOCK_D):
            col = start + tl.arange(0, BLOCK_D)[None, :]
            known = col < GROUP
            x_in, dy_in, w, gate, _ = _read_gradient(
                x_rows, z_rows, weight, dy_rows, col, known & (row < M), known, HAS_Z
            )
            u = x_in * gate if GATE_BEFORE else x_in
            dv = dy_in * gate if GATE_AFTER else dy_in
            squares += tl.sum(u * u, 1, keep_dims=True)
            products += tl.sum(dv * w * u, 1, keep_dims=True)

        # A row past the end is all zeros, whose factor without an eps is infinite: nothing of it may reach a sum.
        r = tl.where(row < M, tl.rsqrt(squares / GROUP + eps), 0.0)
        slope = r * r * (products / GROUP)
        for start in range(0, GROUP, BLOCK_D):
            col = start + tl.arange(0, BLOCK_D)[None, :]
            known = col < GROUP
            inside = known & (row < M)
            x_in, dy_in, w, gate, gate_slope = _read_gradient(
                x_rows, z_rows, weight, dy_rows, col, inside, known, HAS_Z
            )
            u = x_in * gate if GATE_BEFORE else x_in
            dv = dy_in * gate if GATE_AFTER else dy_in
            du = r * (dv * w - u * slope)
            if GATE_BEFORE:
                tl.store(dz_rows + col, (du * x_in * gate_slope).to(dz.dtype.element_ty), mask=inside)
                du *= gate
            if GATE_AFTER:
                v = u * r * w
                if HAS_BIAS:
                    v += _load(bias, col, known)
                tl.store(dz_rows + col, (dy_in * v * gate_slope).to(dz.dtype.element_ty), mask=inside)
            tl.store(dx_rows + col, du.to(dx.dtype.element_ty), mask=inside)
            if GROUP <= BLOCK_D:
                dweight += dv * u * r
                if HAS_BIAS:
                    dbias += dv
            else:
                _add(sums + col, dv * u * r, known, m == begin)
                if HAS_BIAS:
                    _add(sums + d + col, dv, known, m == begin)

    if GROUP <= BLOCK_D:
        col = tl.arange(0, BLOCK_D)[None, :]
        tl.store(sums + col, tl.sum(dweight, 0, keep_dims=True), mask=col < GROUP)
        if HAS_BIAS:
            tl.store(sums + d + col, tl.sum(dbias, 0, keep_dims=True), mask=col < GROUP)


@triton.jit
def _total(sums, dweight, dbias, parts, d, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    blocks = tl.cdiv(d, COLUMNS)
    which, col = tl.program_id(0) // blocks, tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    known = col < d
    sums += which.to(tl.int64) * d + col[None, :]
    found = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, parts, ROWS):
        part = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (part < parts) & known[None, :]
        found += tl.load(sums + part * d * (2 if HAS_BIAS else 1), mask=inside, other=0.0)
    total = tl.sum(found, 0)
    tl.store(dweight + col, total.to(dweight.dtype.element_ty), mask=known & (which == 0))
    if HAS_BIAS:
        tl.store(dbias + col, total.to(dbias.dtype.element_ty), mask=known & (which == 1))


def why_not(*tensors: Tensor | None, **_: object) -> str | None:
    return triton_launch.cannot_store(*tensors)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    *,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    save: bool = False,
) -> tuple[tuple[Tensor], tuple]:
    rows, gate = _rows(x), None if z is None else _rows(z)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    use = triton_launch.settings("gated_norm", "forward", triton_launch.target_of(x), group_size=group_size)
    M, groups = rows.shape[0] * rows.shape[1], rows.shape[2] // group_size
    launch(
        _forward,
        (triton.cdiv(M, use["BLOCK_M"]) * groups,),
        rows, gate, weight.contiguous(), None if bias is None else bias.contiguous(), y,
        M, *rows.shape[1:], eps, *rows.stride()[:2], *_strides(gate),
        **_constants(use, z, bias, group_size, norm_before_gate),
    )  # fmt: skip
    return (y,), (x, weight, bias, z) if save else ()


@together()
def backward(
    saved: tuple[Tensor | None, ...],
    grads: tuple[Tensor | None],
    needs: tuple[bool, ...],
    *,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> tuple[Tensor | None, ...]:
    x, weight, bias, z = saved
    rows, gate, dy = _rows(x), None if z is None else _rows(z), _rows(grads[0])
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dz = None if z is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    target = triton_launch.target_of(x)
    use = triton_launch.settings("gated_norm", "backward", target, group_size=group_size)
    M, groups = rows.shape[0] * rows.shape[1], rows.shape[2] // group_size
    blocks = triton.cdiv(M, use["BLOCK_M"])
    parts = max(1, min(blocks, use["per_multiprocessor"] * target.multiprocessors // groups))
    part_rows = triton.cdiv(blocks, parts) * use["BLOCK_M"]
    parts = triton.cdiv(M, part_rows) if M else 0
    sums = x.new_empty(parts, 1 if bias is None else 2, x.shape[-1], dtype=torch.float32)
    launch(
        _backward,
        (parts * groups,),
        rows, gate, weight.contiguous(), None if bias is None else bias.contiguous(), dy, dx, dz, sums,
        M, *rows.shape[1:], eps, part_rows, *rows.stride()[:2], *_strides(gate), *dy.stride()[:2],
        **_constants(use, z, bias, group_size, norm_before_gate),
    )  # fmt: skip
    dweight, dbias = weight.new_empty(weight.shape), None if bias is None else bias.new_empty(bias.shape)
    use = triton_launch.settings("gated_norm", "total", target)
    launch(
        _total, (sums.shape[1] * triton.cdiv(sums.shape[2], use["COLUMNS"]),),
        sums, dweight, dbias, parts, sums.shape[2], HAS_BIAS=bias is not None, **use,
    )  # fmt: skip
    return dx, dweight, dbias, dz


def _rows(t: Tensor) -> Tensor:
    """t as (outer, inner, d), the last dimension contiguous: a view where its strides allow one."""
    if t.stride(-1) != 1:
        t = t.contiguous()
    return t.flatten(0, -3) if t.dim() > 3 else t[(None,) * (3 - t.dim())]


def _strides(rows: Tensor | None) -> tuple[int, int]:
    return (0, 0) if rows is None else rows.stride()[:2]


def _constants(
    use: dict[str, int], z: Tensor | None, bias: Tensor | None, group_size: int, norm_before_gate: bool
) -> dict[str, int]:
    """The constexprs and options of a launch."""
    return {
        "GROUP": group_size,
        "HAS_Z": z is not None,
        "HAS_BIAS": bias is not None,
        "NORM_BEFORE_GATE": norm_before_gate,
        "BLOCK_M": use["BLOCK_M"],
        "BLOCK_D": min(triton.next_power_of_2(group_size), use["longest"]),
    } | {name: value for name, value in use.items() if name.startswith("num_")}
