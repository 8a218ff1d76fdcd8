"""What the scan's Triton kernels load, store and multiply, against what nobody can do without.

Of sequences whose states never fade to nothing: walks that stop where nothing is left do less. With ``seq_idx`` of one
sequence a batch row, without padding; packed by ``cu_seqlens`` as these have it.
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass

from torch import Tensor

from ..cost import Cost, blocks, nbytes
from ..triton_launch import Target
from . import tiles
from .tiles import CHUNK, Tile

FLOAT, DOUBLE = 4, 8


def forward_floor(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial_states: Tensor | None, seq_idx: Tensor | None, **_: object,
) -> Cost:  # fmt: skip
    """Each input once, y and the final states once; of the products the recurrence's own."""
    (b, l, h, p), n = x.shape, B.shape[3]
    loaded = nbytes(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx)
    return Cost(loaded, nbytes(x) + FLOAT * b * h * p * n, 4 * b * l * h * p * n)


def backward_floor(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial_states: Tensor | None, seq_idx: Tensor | None, **_: object,
) -> Cost:  # fmt: skip
    """Each input and dy once, each gradient once; of the products dx, dB, dC, the states anew and their gradients."""
    (b, l, h, p), n = x.shape, B.shape[3]
    stored = nbytes(x, dt, A, B, C, D, z, dt_bias, initial_states)
    return Cost(stored + nbytes(x, seq_idx), stored, 10 * b * l * h * p * n)


@dataclass(frozen=True)
class _Ranges:
    """What the forward walks: ``walked`` positions of each piece, then of each packed sequence whose state is wanted.

    ``kept`` positions count; segments begin with ``earlier`` pieces and ``initials`` times the initial state. Offsets
    are read ``once`` for each head block, and by a tile of each of ``walked`` ``each`` times.
    """

    walked: tuple[int, ...]
    kept: int
    earlier: int
    initials: int
    once: int = 0
    each: tuple[int, ...] = ()


def _ranges(walk: tiles.Walk, b: int, l: int, cu_seqlens: Tensor | None, varlen_states: bool) -> _Ranges:
    if cu_seqlens is None:
        earlier = walk.per_segment * walk.segments * (walk.segments - 1) // 2
        return _Ranges((walk.piece,) * (b * walk.pieces), b * l, earlier * b, walk.segments * b)
    offsets = cu_seqlens.tolist()
    count = len(offsets) - 1
    tries = _tries(count + 1)
    ends = [((k * walk.piece, (k + 1) * walk.piece), 0) for k in range(walk.pieces)]
    if varlen_states:
        ends += [((0, end if end > start else 0), 2) for start, end in itertools.pairwise(offsets)]
    walked, each, reached = [], [], []
    for (start, end), more in ends:
        upto = bisect.bisect_right(offsets, end - 1)
        inside = 0 < upto <= count
        walked.append(end - max(start, offsets[upto - 1]) if inside else 0)
        each.append(tries + inside + more)
        reached.append(inside and (offsets[upto - 1] < start or (start == 0 and upto == 1)))
    earlier, initials = 0, 0
    for segment in range(walk.segments):
        pieces = reached[: segment * walk.per_segment][::-1]
        earlier += pieces.index(False) + 1 if False in pieces else len(pieces)
        initials += False not in pieces
    return _Ranges(tuple(walked), min(l, offsets[-1]), earlier, initials, walk.chunks * walk.chunk * tries + l,
                   tuple(each))  # fmt: skip


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial_states: Tensor | None, seq_idx: Tensor | None, cu_seqlens: Tensor | None = None, *, target: Target,
    save: bool = False, varlen_states: bool = False, **_: object,
) -> dict[str, Cost]:  # fmt: skip
    """x, B, C and z have one type. ssd_ends: dt once for steps and once for each piece's tiles of the state, and there
    x and B. ssd_walk: x and z once, B, C and C B^T for each pair of heads and tile of channels, steps for each tile."""
    (b, l, h, p), n = x.shape, B.shape[3]
    several = seq_idx is not None or cu_seqlens is not None
    walk = tiles.walk(target, x, B, z, several, save)
    narrow = walk.tile.constants["NARROW"]
    ids, found = _size(seq_idx), _ranges(walk, b, l, cu_seqlens, varlen_states)
    number = _size(A) + _size(dt_bias)  # of a head

    head_blocks = blocks(h, tiles.block(h, walk.ends.use["BLOCK_H"], 1))
    steps = Cost(nbytes(dt) + b * walk.chunks * h * number + b * head_blocks * (2 * l - 1) * ids
                 + head_blocks * found.once * _size(cu_seqlens),
                 b * walk.chunks * walk.chunk * (4 * h * FLOAT + (4 if several else 0)))  # fmt: skip
    tasks, positions = h * len(found.walked), h * sum(found.walked)
    p_blocks, n_blocks = walk.ends.p_blocks, walk.ends.n_blocks
    links = 2 * positions - b * h if tasks else 0  # the first position of all has none before it
    loaded = p_blocks * n_blocks * (tasks * number + positions * _size(dt) + h * sum(found.each) * _size(cu_seqlens))
    loaded += positions * (n_blocks * p * _size(x) + p_blocks * n * _size(B))
    loaded += p_blocks * n_blocks * links * ids
    loaded += h * p * n * _size(initial_states) if varlen_states and cu_seqlens.shape[0] > 1 else 0
    group = walk.chunk * walk.ends.use["GROUP"]
    walked = h * sum(blocks(positions, group) * group for positions in found.walked)
    flops = p_blocks * n_blocks * walked * _product(walk.ends, "BLOCK_P", "BLOCK_N")
    ends = Cost(loaded, (tasks * p * n + b * h * walk.pieces) * FLOAT, flops * (tiles.TERMS if narrow else 1))

    programs, parts = b * h * walk.tile.p_blocks, walk.tile.n_blocks  # as if each took one head
    together = programs // walk.heads
    loaded = h * p * (b * walk.segments * _size(D) + found.initials * n * _size(initial_states))
    loaded += found.earlier * h * (p * n + walk.tile.p_blocks * parts) * FLOAT
    vectors, numbers = (7, 2) if tiles.exact(x) else (5, 1)
    loaded += walk.chunks * programs * (vectors * walk.chunk + numbers) * FLOAT
    loaded += walk.chunks * together * (2 * walk.chunk if several else 0) * FLOAT
    again = 1 if not narrow and parts > 1 else 0
    loaded += found.kept * h * p * (_size(x) + _size(z))
    loaded += found.kept // b * n * (together + programs * again) * (_size(B) + _size(C))
    stored = nbytes(x) + (nbytes(z) if save else 0) + b * h * p * n * FLOAT
    stored += b * blocks(l, CHUNK) * h * p * n * FLOAT if save else 0
    inside = together * parts * _product(walk.tile, "BLOCK_N") * walk.chunk  # C B^T
    inside += programs * _product(walk.tile, "BLOCK_P") * walk.chunk
    through = programs * parts * (1 + (tiles.TERMS if narrow else 1)) * _product(walk.tile, "BLOCK_P", "BLOCK_N")
    flops = walk.chunks * walk.chunk * (inside + through)
    return {"ssd_ends": steps + ends, "ssd_walk": Cost(loaded, stored, flops)}


def walk_exponentials(x: Tensor, B: Tensor, z: Tensor | None, seq_idx: Tensor | None, initial_states: Tensor | None, *,
                      target: Target, save: bool = False, **_: object) -> int:  # fmt: skip
    """How many exponentials ssd_walk takes: L of each head and chunk, gates, one for each state that seeds it, and
    of float32 what is left of the state at each position and after the chunk."""
    b, l, h, _ = x.shape
    walk = tiles.walk(target, x, B, z, seq_idx is not None, save)
    programs, tile = b * h * walk.tile.p_blocks, walk.tile
    each = walk.chunk * (walk.chunk + (tile.constants["BLOCK_P"] if z is not None else 0))
    each += walk.chunk + 1 if tiles.exact(x) else 0
    earlier = walk.per_segment * walk.segments * (walk.segments - 1) // 2
    seeds = earlier + (walk.segments if initial_states is not None else 0)
    return programs * (walk.chunks * each + seeds * tile.n_blocks)


@dataclass(frozen=True)
class _Packing:
    """What the backward meets in each chunk, all batch rows together: ``kept`` positions that count, and of packed
    sequences whose states have gradients ``ends``, of which ``full`` are not empty. A bisection of their ends reads
    ``tries`` offsets."""

    kept: tuple[int, ...]
    ends: tuple[int, ...] = ()
    full: tuple[int, ...] = ()
    tries: int = 0
    size: int = 0  # bytes of an offset

    @property
    def positions(self) -> int:
        return sum(self.kept)

    def offsets(self, readers: int) -> int:
        """Bytes of offsets that as many readers of each chunk load, to find its ends and where each begins."""
        return readers * 2 * self.size * (self.tries * len(self.ends) + sum(self.ends))


def _packing(b: int, l: int, cu_seqlens: Tensor | None, varlen_states: bool) -> _Packing:
    starts = range(0, l, CHUNK)
    if cu_seqlens is None:
        return _Packing(tuple(b * min(CHUNK, l - start) for start in starts))
    offsets = [min(offset, l) for offset in cu_seqlens.tolist()]
    kept = tuple(max(0, min(start + CHUNK, offsets[-1]) - start) for start in starts)
    if not varlen_states:
        return _Packing(kept, size=_size(cu_seqlens))
    pairs = list(itertools.pairwise(offsets))
    ends = [[begin < end for begin, end in pairs if start < end <= start + CHUNK] for start in starts]
    return _Packing(kept, tuple(map(len, ends)), tuple(map(sum, ends)), _tries(len(pairs)), _size(cu_seqlens))


def backward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial_states: Tensor | None, seq_idx: Tensor | None, cu_seqlens: Tensor | None = None, *, target: Target,
    varlen_states: bool = False, **_: object,
) -> dict[str, Cost]:  # fmt: skip
    """Gradients of everything, from those of y (in x's type) and of the final states."""
    (b, l, h, p), n = x.shape, B.shape[3]
    chunks = blocks(l, CHUNK)
    narrow = tiles.narrow_backward(z, x, B, C)
    each = b * h * chunks  # heads' chunks
    number = _size(A) + _size(dt_bias)
    vector = CHUNK * FLOAT
    skip = 0 if D is None else D.numel() // h
    sums = each * (2 + skip) * FLOAT
    packing = _packing(b, l, cu_seqlens, varlen_states)

    walk = tiles.back_walk(target, x, n, narrow, varlen_states)
    tile, terms = walk.tile, tiles.TERMS if narrow else 1
    pieces = _later_pieces(walk, b, l, cu_seqlens)
    later, finals = _seeds(walk, b, pieces)
    tasks = b * h * tile.p_blocks * tile.n_blocks
    loaded = h * (finals * p * n * FLOAT + packing.positions * (tile.p_blocks * n * _size(C)
                  + tile.n_blocks * p * (_size(x) + _size(z))))  # fmt: skip
    loaded += tasks * chunks * (3 * vector + CHUNK)
    loaded += later * (h * p * n * FLOAT + tasks // b * DOUBLE)
    loaded += packing.offsets(tasks) + sum(packing.ends) * h * p * n * FLOAT
    if varlen_states and initial_states is not None and cu_seqlens.shape[0] > 1:
        loaded += tasks * packing.size + h * p * n * FLOAT  # a first sequence that is empty
    flops = tasks * chunks * CHUNK * _product(tile, "BLOCK_P", "BLOCK_N") * terms
    deep = tiles.back_chunks(target, x, n, narrow, z is not None and varlen_states)
    return {
        "ssd_starts": _starts(x, dt, C, z, number, seq_idx, walk, terms, packing, pieces, cu_seqlens),
        "ssd_back_walk": Cost(loaded, each * p * n * FLOAT + nbytes(initial_states), flops),
        "ssd_back_chunks": _inputs(x, B, C, D, z, target, deep, packing)
        + _inside(x, B, C, z, skip, target, deep, packing) + _states(x, B, C, z, target, deep, packing),
        "ssd_back_close": Cost(
            packing.positions * h * _size(dt) + each * ((7 + deep.n_blocks) * vector + CHUNK + number)
            + 4 * _parts(x, B, target, deep) * B.numel() * FLOAT,
            nbytes(dt, B, C) + 2 * each * FLOAT,
        ),
        "ssd_back_total": Cost(sums, nbytes(A, D, dt_bias)),
    }  # fmt: skip


def _later_pieces(walk: tiles.Walk, b: int, l: int, cu_seqlens: Tensor | None) -> list[tuple[int, int, bool, int]]:
    """Of each piece whose start is asked for: from where to where it is walked, whether what comes after it reaches
    nothing before it, and how many packed sequences end where it does."""
    found = []
    for which in range(walk.pieces):
        start = (walk.per_segment + which) * walk.piece
        end, wiped, ending = min(start + walk.piece, l), False, 0
        if cu_seqlens is not None:
            offsets = [min(offset, l) for offset in cu_seqlens.tolist()]
            count = bisect.bisect_right(offsets, start - 1)
            begin = offsets[count] if count < len(offsets) else start
            wiped = count < len(offsets) and begin < end
            end = min(begin, end)
            ending = sum(start < offset <= end for offset in offsets[1:])
        found.append((start, max(start, end), wiped, ending))
    return found


def _seeds(walk: tiles.Walk, b: int, pieces: list[tuple[int, int, bool, int]]) -> tuple[int, int]:
    """Of all rows: how many pieces the segments begin with, and how often the final states' gradient reaches one."""
    later = finals = 0
    for segment in range(walk.segments):
        wiped = [piece[2] for piece in pieces[segment * walk.per_segment :]]
        later += wiped.index(True) + 1 if True in wiped else len(wiped)
        finals += True not in wiped
    return b * later, b * finals


def _starts(
    x: Tensor, dt: Tensor, C: Tensor, z: Tensor | None, number: int, seq_idx: Tensor | None, walk: tiles.Walk,
    terms: int, packing: _Packing, pieces: list[tuple[int, int, bool, int]], cu_seqlens: Tensor | None,
) -> Cost:  # fmt: skip
    """The steps, dt once for each tile of the state of each piece, and there dy (and z) and C."""
    (b, l, h, p), n = x.shape, C.shape[3]
    tile, ids = walk.ends, _size(seq_idx)
    head_blocks = blocks(h, tiles.block(h, tile.use["BLOCK_H"], 1))
    tries = 0 if cu_seqlens is None else _tries(cu_seqlens.shape[0])
    loaded = packing.positions * h * _size(dt) + b * walk.chunks * h * number + b * head_blocks * (2 * l - 1) * ids
    if cu_seqlens is not None:
        loaded += head_blocks * (walk.chunks * CHUNK * tries + l) * packing.size
    steps = Cost(loaded, b * walk.chunks * CHUNK * (3 * h * FLOAT + 1))
    group, lengths = tile.use["GROUP"], [end - start for start, end, *_ in pieces]
    heads, tiles_a_head, positions = b * h, tile.p_blocks * tile.n_blocks, sum(lengths)
    loaded = heads * tiles_a_head * (walk.pieces * number + positions * (_size(dt) + 2 * ids))
    loaded += heads * positions * (tile.p_blocks * n * _size(C) + tile.n_blocks * p * (_size(x) + _size(z)))
    walked = sum(blocks(length, CHUNK * group) * group for length in lengths)  # chunks
    if cu_seqlens is not None:
        loaded += heads * tiles_a_head * walk.pieces * (tries + 1) * packing.size
    if packing.tries:
        ends = sum(ending for *_, ending in pieces)
        loaded += heads * tiles_a_head * 2 * packing.size * (packing.tries * walked + ends)
        loaded += heads * ends * p * n * FLOAT
    flops = heads * tiles_a_head * walked * CHUNK * _product(tile, "BLOCK_P", "BLOCK_N") * terms
    return steps + Cost(loaded, heads * walk.pieces * (p * n * FLOAT + DOUBLE), flops)


def _inputs(
    x: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, target: Target, tile: Tile, packing: _Packing
) -> Cost:
    """The chunks' first role: dx and dz."""
    (b, l, h, p), (_, _, g, n) = x.shape, B.shape
    chunks, deep_blocks = blocks(l, CHUNK), blocks(n, tile.constants["DEEP_N"])
    each, programs = b * h * chunks, b * g * chunks * _parts(x, B, target, tile)
    columns, full = h * packing.positions * p, h * sum(packing.full)
    once = n * (_size(B) + _size(C)) + (n * _size(B) if deep_blocks == 1 else 0)
    loaded = programs // (b * chunks) * packing.positions * once + programs * CHUNK
    loaded += each * (3 * CHUNK * FLOAT + p * _size(D) + p * n * FLOAT) + columns * (2 * _size(x) + _size(z))
    if deep_blocks > 1:
        again = packing.positions + sum(k * f for k, f in zip(packing.kept, packing.full, strict=False))
        loaded += h * tile.p_blocks * again * n * _size(B)
    if z is not None:
        loaded += columns * (2 * _size(z) + _size(x))  # the gate again, y before it, dy again
    loaded += full * p * n * FLOAT + _offsets_a_chunk(packing, programs, h * tile.p_blocks)
    flops = programs * CHUNK * deep_blocks * _product(tile, "DEEP_N") * CHUNK
    terms = tiles.TERMS if tile.constants["NARROW"] else 1
    inside, through = _product(tile, "BLOCK_P") * CHUNK, deep_blocks * _product(tile, "BLOCK_P", "DEEP_N") * terms
    flops += tile.p_blocks * CHUNK * (each * inside + (each + full) * through)
    return Cost(loaded, nbytes(x, z) + each * 2 * CHUNK * FLOAT, flops)


def _inside(
    x: Tensor, B: Tensor, C: Tensor, z: Tensor | None, skip: int, target: Target, tile: Tile, packing: _Packing
) -> Cost:
    """The second: dB and dC within the chunk, the sums of T, and dD's."""
    (b, l, h, p), (_, _, g, n) = x.shape, B.shape
    chunks = blocks(l, CHUNK)
    each, programs = b * h * chunks, b * g * chunks * _parts(x, B, target, tile)
    loaded = programs // (b * chunks) * 2 * packing.positions * n * (_size(B) + _size(C)) + programs * CHUNK
    loaded += each * 3 * CHUNK * FLOAT + h * packing.positions * p * (2 * _size(x) + _size(z))
    stored = each * (2 * CHUNK + skip) * FLOAT + programs // chunks * 2 * l * n * FLOAT
    flops = programs * CHUNK * tile.n_blocks * 3 * _product(tile, "BLOCK_N") * CHUNK
    flops += each * CHUNK * tile.p_blocks * _product(tile, "BLOCK_P") * CHUNK
    return Cost(loaded, stored, flops)


def _states(x: Tensor, B: Tensor, C: Tensor, z: Tensor | None, target: Target, tile: Tile, packing: _Packing) -> Cost:
    """The others, one a block of states: dB and dC through the states."""
    (b, l, h, p), (_, _, g, n) = x.shape, B.shape
    chunks = blocks(l, CHUNK)
    each, programs = b * h * chunks, b * g * chunks * _parts(x, B, target, tile)
    positions, full = h * packing.positions, h * sum(packing.full)
    loaded = programs * tile.n_blocks * CHUNK + each * tile.n_blocks * 3 * CHUNK * FLOAT
    loaded += each * 2 * p * n * FLOAT + tile.n_blocks * positions * p * (2 * _size(x) + _size(z))
    loaded += positions * n * _size(C) + full * p * n * FLOAT
    loaded += tile.n_blocks * _offsets_a_chunk(packing, programs, h * tile.p_blocks)
    stored = each * tile.n_blocks * CHUNK * FLOAT + programs // chunks * 2 * l * n * FLOAT
    terms = 1 + (tiles.TERMS if tile.constants["NARROW"] else 1)
    flops = tile.n_blocks * tile.p_blocks * CHUNK * (each * terms + full) * _product(tile, "BLOCK_P", "BLOCK_N")
    return Cost(loaded, stored, flops)


def _offsets_a_chunk(packing: _Packing, programs: int, readers: int) -> int:
    """Bytes of offsets: each program finds its chunk's ends, each head's block of channels where each begins."""
    return 2 * packing.size * (packing.tries * programs + readers * sum(packing.ends))


def _tries(count: int) -> int:
    """How many of ``count`` offsets a bisection reads."""
    return max(0, count - 1).bit_length() + 1


def _parts(x: Tensor, B: Tensor, target: Target, tile: Tile) -> int:
    """In how many parts a group's heads are summed."""
    (b, l, h, _), g = x.shape, B.shape[2]
    programs = (2 + tile.n_blocks) * g * b * blocks(l, CHUNK)
    return blocks(h // g, tiles.heads_a_program(target, programs, h // g, tile.use))


def _product(tile: Tile, *names: str) -> int:
    """FLOPs of products of these blocks, for each position."""
    found = 2
    for name in names:
        found *= tile.constants[name]
    return found


def _size(t: Tensor | None) -> int:
    return 0 if t is None else t.element_size()
