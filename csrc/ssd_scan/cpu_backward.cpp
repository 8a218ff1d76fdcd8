// The chunked scan, backward: slabs from the last to the first, chunks likewise. The maths of one head and chunk is in
// backward.h. A group's heads are summed in at most kHeadBlocks blocks, cut by the shapes alone, and the blocks in order:
// the sums over heads for dB and dC, over chunks for dA, dD and dt_bias, have one order whatever the threads.
#include "../common/pages.h"
#include "backward.h"

namespace omnimamba {
namespace ssd {
namespace {

// The workspace of a backward pass.
struct Backward {
  Backward(const SsdScanParams& params, float* memory)
      : q(params),
        z(params),
        block_heads((z.per_group + kHeadBlocks - 1) / kHeadBlocks),
        blocks((z.per_group + block_heads - 1) / block_heads),
        units(q.batch * q.groups * blocks),
        side_by_side(chunks_side_by_side(q, units)),
        arena(memory),
        prepared(arena, q, z, true) {
    states = {q.states.at<float>(), q.max_chunks + 1, q.heads, z.state_floats};
    dstates = {nullptr, side_by_side ? z.slab + 1 : 1, q.heads, z.state_floats};
    dstates.base = arena.take(q.batch * dstates.slots * q.heads * z.state_floats);
    group_step = counted(&GroupGradient::take);
    groups = arena.take(q.batch * z.slab * q.groups * blocks * group_step);
    head_step = 3 + q.headdim;
    heads = arena.take(q.batch * z.slab * q.heads * head_step);
    totals = reinterpret_cast<double*>(arena.take(2 * q.heads * head_step));
    scratch_step = counted([](Arena& a, const Sizes& sizes) { return BackwardScratch(a, sizes); });
    scratch = arena.take(q.threads * scratch_step);
  }

  template <class Take>
  int64_t counted(Take take) const {
    Arena counter(nullptr);
    take(counter, z);
    return counter.used();
  }
  BackwardScratch of_thread(int thread) const {
    Arena mine(scratch + thread * scratch_step);
    return BackwardScratch(mine, z);
  }
  GroupGradient group(int64_t b, int64_t in_slab, int64_t g, int64_t block) const {
    Arena part(groups + (((b * z.slab + in_slab) * q.groups + g) * blocks + block) * group_step);
    return GroupGradient::take(part, z);
  }
  // A unit's shares: of the gradients of A and of the bias, the chunk's decay, and of D's gradient.
  float* head(const Unit& u) const { return heads + ((u.b * z.slab + u.in_slab) * q.heads + u.h) * head_step; }

  const SsdScanParams& q;
  Sizes z;
  int64_t block_heads, blocks, units;
  bool side_by_side;
  Arena arena;
  Prepared prepared;
  StateRing states, dstates;  // slot c of dstates: gradient of the state before chunk c
  int64_t group_step, head_step, scratch_step;
  float *groups, *heads, *scratch;
  double* totals;  // of the heads' shares over all chunks so far
};

// own = C^T (exp(c) dy), and the state's gradient before the chunk: exp(c_q) dnext + own, or own alone.
void retreat(const BackwardUnit& u, const float* dnext, float* dstate) {
  each_tile(u.z.n, [&](auto height, int i) {
    for (int j = 0; j < u.z.panels; j++) {
      Tile<height> tile;
      tile_add<1>(tile, u.at.chunk.length, u.pack.C_states + i * u.at.chunk.length, kTileRows,
                  u.s.weighted + j * panel_floats(), kTileColumns);
      const int64_t at = j * u.z.state_panel + i * kTileColumns;
      if (dnext) tile_carry(tile, dnext + at, u.s.decay->whole);
      tile_store(tile, dstate + at);
    }
  });
}

// Zero gradients for a chunk of padding.
template <class T>
void padding_gradient(const SsdScanParams& q, const Unit& u) {
  const int p = static_cast<int>(q.headdim);
  for (int64_t t = u.chunk.start; t < u.chunk.start + u.chunk.length; t++) {
    *q.ddt.at<float>(u.b, t, u.h) = 0;
    for (int column = 0; column < p; column += W) {
      store_left(q.dx.at<T>(u.b, t, u.h) + column, vf{}, p - column);
      if (q.dz) store_left(q.dz.at<T>(u.b, t, u.h) + column, vf{}, p - column);
    }
  }
}

// share[c] = sum over t of dy x.
void skip_gradient(const BackwardUnit& u, float* share) {
  for (int column = 0; column < u.z.p; column += W) {
    const int64_t at = column / kTileColumns * panel_floats() + column % kTileColumns;
    vf total{};
    for (int t = 0; t < u.at.chunk.length; t++)
      total += load(u.s.dy + at + t * kTileColumns) * load(u.s.x + at + t * kTileColumns);
    store_left(share + column, total, u.z.p - column);
  }
}

template <class T>
void differentiate(const BackwardUnit& u, float* shares) {
  *u.s.sums = {};
  each_decay(*u.s.decay, u.at.chunk.length, [&](int t, int s, vf L) {
    const int at = t * kRow + s;
    store(u.s.L + at, L);
    store(u.s.M + at, select(L > vf{}, load(u.pack.G + at) * (L * load(u.s.decay->dt + s)), vf{}));
  });
  input_gradient<T>(u);
  score_gradient(u);
  if (u.state)
    state_part(u, u.state, u.s.dy_columns, u.s.decay->from_start, u.pack.C_columns, u.sum.dC_columns, u.s.sums->R);
  state_part(u, u.dnext, u.s.x_columns, u.s.decay->weight, u.pack.B_columns, u.sum.dB_columns, u.s.sums->U);
  StepGradient steps = step_gradient(u);
  shares[0] = steps.dA;
  shares[1] = steps.dbias;
  skip_gradient(u, shares + 3);
}

template <class T>
void scan_unit(const Backward& f, const Unit& at, int thread, int64_t g, int64_t block, Work work) {
  float *shares = f.head(at), *dstate = f.dstates.at(at.b, at.c, at.h);
  const float* dnext = f.dstates.at(at.b, at.c + 1, at.h);
  const bool continues = at.chunk.kind == ChunkKind::Continues;
  if (at.chunk.kind == ChunkKind::Padding) {
    if (work != Work::States) {
      padding_gradient<T>(f.q, at);
      std::memset(shares, 0, sizeof(float) * static_cast<size_t>(f.head_step));
    }
  } else {
    const int64_t row = f.prepared.head(at.b, at.in_slab, at.h);
    Ahead ahead;
    if (at.h + 1 < f.q.heads) {
      Unit next = at;
      next.h++;
      for (const View* v : {&f.q.x, &f.q.dy, &f.q.dx}) ahead.add<T>(*v, next, f.q.headdim);
    }
    BackwardUnit u{f.q,
                   f.z,
                   at,
                   f.of_thread(thread),
                   f.prepared.group(at.b, at.in_slab, g),
                   f.group(at.b, at.in_slab, g, block),
                   f.prepared.dt + row,
                   f.prepared.slope + row,
                   continues ? f.states.at(at.b, at.c, at.h) : nullptr,
                   dnext,
                   ahead};
    fill_decay(u.dt, *f.q.A.at<float>(at.h), at.chunk.length, *u.s.decay);
    pack_head<T>(u);
    if (work != Work::States) differentiate<T>(u, shares);
    if (work != Work::Rest && continues) retreat(u, work == Work::All ? dnext : nullptr, dstate);
    if (work == Work::States) shares[2] = u.s.decay->whole;
  }
  if (work == Work::All && !continues) std::memset(dstate, 0, sizeof(float) * static_cast<size_t>(f.z.state_floats));
}

// The gradient that reaches the state after a chunk from outside, one panel.
void receive(const Backward& f, const Unit& u, bool last, int panel) {
  float* dnext = f.dstates.at(u.b, u.c + 1, u.h) + panel * f.z.state_panel;
  const View &final = f.q.dfinal_states, &varlen = f.q.dvarlen_states;
  if (last && final) {
    load_state(final.at<float>(u.b, u.h), final.stride[2], final.stride[3], f.z, panel, dnext);
  } else if (last) {
    std::memset(dnext, 0, sizeof(float) * static_cast<size_t>(f.z.state_panel));
  }
  if (u.chunk.varlen >= 0 && varlen)
    for (int c = 0; c < std::min(kTileColumns, f.z.p - panel * kTileColumns); c++)
      for (int i = 0; i < f.z.n; i++)
        dnext[i * kTileColumns + c] += *varlen.at<float>(u.chunk.varlen, u.h, panel * kTileColumns + c, i);
}

void hand_out(const Backward& f, int64_t b, int64_t h, int panel) {
  const View& v = f.q.dinitial_states;
  if (v)
    store_state(f.dstates.at(b, 0, h) + panel * f.z.state_panel, f.z, panel, v.at<float>(b, h), v.stride[2],
                v.stride[3]);
}

// One chunk for a block of a group's heads.
template <class T>
void scan_block(const Backward& f, int64_t c0, int64_t unit, int64_t in_slab, int thread, Work work) {
  const int64_t block = unit % f.blocks, g = unit / f.blocks % f.q.groups, b = unit / f.blocks / f.q.groups;
  Chunks chunks(f.q, b);
  const int64_t c = c0 + in_slab;
  if (c >= chunks.count) return;
  if (work != Work::States) {
    float* sums = f.group(b, in_slab, g, block).dB_columns;
    std::memset(sums, 0, sizeof(float) * static_cast<size_t>(f.group_step));
  }
  const int64_t h0 = g * f.z.per_group + block * f.block_heads;
  const int64_t h1 = std::min(h0 + f.block_heads, (g + 1) * f.z.per_group);
  for (int64_t h = h0; h < h1; h++) {
    Unit u{b, c, h, in_slab, chunks[c]};
    for (int j = 0; j < f.z.panels && work == Work::All; j++) receive(f, u, c + 1 == chunks.count, j);
    scan_unit<T>(f, u, thread, g, block, work);
    for (int j = 0; j < f.z.panels && work == Work::All && c == 0; j++) hand_out(f, b, h, j);
  }
}

// From each chunk's own part of the states' gradients to the whole, from the last chunk of the slab to the first.
void join_states(const Backward& f, int64_t c0) {
  parallel_for(f.q.threads, f.q.batch * f.q.heads * f.z.panels, [&](int64_t i, int) {
    const int panel = static_cast<int>(i % f.z.panels);
    const int64_t h = i / f.z.panels % f.q.heads, b = i / f.z.panels / f.q.heads;
    Chunks chunks(f.q, b);
    for (int64_t c = std::min(c0 + f.z.slab, chunks.count) - 1; c >= c0; c--) {
      Unit u{b, c, h, c - c0, chunks[c]};
      receive(f, u, c + 1 == chunks.count, panel);
      const float* dnext = f.dstates.at(b, c + 1, h) + panel * f.z.state_panel;
      float* dstate = f.dstates.at(b, c, h) + panel * f.z.state_panel;
      const bool continues = u.chunk.kind == ChunkKind::Continues;
      const float whole = continues ? f.head(u)[2] : 0.0f;
      for (int64_t k = 0; k < f.z.state_panel; k += W)
        store(dstate + k, continues ? carried(load(dnext + k), whole, load(dstate + k)) : vf{});
      if (c == 0) hand_out(f, b, h, panel);
    }
  });
}

template <class T>
void scan_slab(const Backward& f, int64_t c0) {
  if (!f.side_by_side) {
    parallel_for(f.q.threads, f.units, [&](int64_t unit, int thread) {
      for (int64_t c = f.z.slab - 1; c >= 0; c--) scan_block<T>(f, c0, unit, c, thread, Work::All);
    });
    return;
  }
  auto all = [&](Work work) {
    parallel_for(f.q.threads, f.units * f.z.slab,
                 [&](int64_t i, int thread) { scan_block<T>(f, c0, i / f.z.slab, i % f.z.slab, thread, work); });
  };
  all(Work::States);
  join_states(f, c0);
  all(Work::Rest);
}

// rows[t][n] += columns[n][t], and out to the caller.
template <class T>
void store_rows(const float* columns, const Sizes& z, int length, float* rows, const View& out, int64_t b,
                int64_t start, int64_t g) {
  for (int t = 0; t < length; t++)
    for (int i = 0; i < z.n; i++) rows[t * z.bc_row + i] += columns[i * kRow + t];
  for (int t = 0; t < length; t++)
    for (int i = 0; i < z.n; i += W) store_left(out.at<T>(b, start + t, g) + i, load(rows + t * z.bc_row + i), z.n - i);
}

// dC = (sum over heads) + dG B, dB = (sum over heads) + dG^T C.
template <class T>
void finish_group(const Backward& f, int64_t b, int64_t in_slab, Chunk chunk, int64_t g, float* rows) {
  const int length = chunk.length, step = f.z.bc_row;
  GroupGradient sum = f.group(b, in_slab, g, 0);
  for (int64_t block = 1; block < f.blocks; block++) {
    const float* more = f.group(b, in_slab, g, block).dB_columns;
    for (int64_t i = 0; i < f.group_step; i += W) store(sum.dB_columns + i, load(sum.dB_columns + i) + load(more + i));
  }
  GroupPack pack = f.prepared.group(b, in_slab, g);
  for (int t = 0; t < length; t += kTileRows)
    for (int i = 0; i < f.z.n; i += kTileColumns) {
      Tile tile;
      tile_add<kRow>(tile, std::min(length, t + kTileRows), sum.dG + t * kRow, 1, pack.B_rows + i, step);
      tile_each(tile, [&](int r, int v, vf& acc) { store(rows + (t + r) * step + i + v * W, acc); });
    }
  store_rows<T>(sum.dC_columns, f.z, length, rows, f.q.dC, b, chunk.start, g);
  for (int s = 0; s < length; s += kTileRows)
    for (int i = 0; i < f.z.n; i += kTileColumns) {
      Tile tile;
      tile_add<1>(tile, length - s, sum.dG + s * kRow + s, kRow, pack.C_rows + s * step + i, step);
      tile_each(tile, [&](int r, int v, vf& acc) { store(rows + (s + r) * step + i + v * W, acc); });
    }
  store_rows<T>(sum.dB_columns, f.z, length, rows, f.q.dB, b, chunk.start, g);
}

template <class T>
void finish_slab(const Backward& f, int64_t c0) {
  parallel_for(f.q.threads, f.q.batch * f.z.slab * f.q.groups, [&](int64_t i, int thread) {
    const int64_t g = i % f.q.groups, in_slab = i / f.q.groups % f.z.slab, b = i / f.q.groups / f.z.slab;
    Chunks chunks(f.q, b);
    if (c0 + in_slab >= chunks.count) return;
    const Chunk chunk = chunks[c0 + in_slab];
    if (chunk.kind != ChunkKind::Padding) {
      finish_group<T>(f, b, in_slab, chunk, g, f.of_thread(thread).rows);
      return;
    }
    for (int64_t t = chunk.start; t < chunk.start + chunk.length; t++)
      for (int n = 0; n < f.z.n; n += W) {
        store_left(f.q.dB.at<T>(b, t, g) + n, vf{}, f.z.n - n);
        store_left(f.q.dC.at<T>(b, t, g) + n, vf{}, f.z.n - n);
      }
  });
  parallel_for(f.q.threads, f.q.heads, [&](int64_t h, int) {
    for (int64_t b = 0; b < f.q.batch; b++) {
      Chunks chunks(f.q, b);
      for (int64_t c = std::min(c0 + f.z.slab, chunks.count) - 1; c >= c0; c--) {
        const float* shares = f.head({b, c, h, c - c0, chunks[c]});
        for (int64_t i = 0; i < f.head_step; i++) f.totals[h * f.head_step + i] += shares[i];
      }
    }
  });
}

template <class T>
void run(const Backward& f) {
  const SsdScanParams& q = f.q;
  for (int thread = 0; thread < q.threads; thread++) std::memset(f.of_thread(thread).M, 0, sizeof(float) * kRow * kRow);
  claim_pages(q.dx.data, q.batch * q.length * q.heads * q.headdim * static_cast<int64_t>(sizeof(T)), q.threads);
  std::fill_n(f.totals, q.heads * f.head_step, 0.0);
  const int64_t slabs = q.max_chunks ? (q.max_chunks + f.z.slab - 1) / f.z.slab : 0;
  for (int64_t c0 = (slabs - 1) * f.z.slab; c0 >= 0; c0 -= f.z.slab) {
    prepare_slab<T>(q, f.z, f.prepared, c0);
    scan_slab<T>(f, c0);
    finish_slab<T>(f, c0);
  }
  for (int64_t h = 0; h < q.heads; h++) {
    const double* total = f.totals + h * f.head_step;
    *q.dA.at<float>(h) = static_cast<float>(total[0]);
    *q.ddt_bias.at<float>(h) = static_cast<float>(total[1]);
    for (int64_t c = 0; c < q.headdim; c++) *q.dD.at<float>(h, c) = static_cast<float>(total[3 + c]);
  }
}

}  // namespace
}  // namespace ssd

int64_t ssd_scan_backward_workspace(const SsdScanParams& q) { return ssd::Backward(q, nullptr).arena.used(); }

void ssd_scan_backward(const SsdScanParams& q) {
  ssd::Backward backward(q, q.workspace.at<float>());
  for_float_type(q.x.dtype, [&](auto zero) { ssd::run<decltype(zero)>(backward); });
}

}  // namespace omnimamba
