// The chunked scan, forward. The maths and the plan are in ssd_scan.h.
#include <atomic>
#include <thread>
#include <vector>

#include "../common/pages.h"
#include "ahead.h"
#include "prepare.h"

namespace omnimamba {
namespace ssd {
namespace {

// What one thread needs for one head and chunk.
struct Scratch {
  Scratch(Arena& arena, const Sizes& z)
      : x(arena.take(z.panels * panel_floats())),
        M(arena.take(kRow * kRow)),
        D(arena.take(int64_t{z.panels} * kTileColumns)),
        decay(reinterpret_cast<Decay*>(arena.take(sizeof(Decay) / sizeof(float)))) {}
  float *x, *M, *D;
  Decay* decay;
};

// Whether y goes around the caches: where it is larger than they are, so that nobody finds it there in any case, and lies
// in whole lines.
inline bool streams(const SsdScanParams& q) {
  constexpr int64_t large = int64_t{4} << 20;
  const int64_t size = q.y.dtype == DType::F32 ? 4 : 2, line = 64 / size;
  bool whole = kTileColumns % line == 0 && q.headdim % kTileColumns == 0;
  for (int i = 0; i < 3; i++) whole = whole && q.y.stride[i] % line == 0;
  return whole && reinterpret_cast<uintptr_t>(q.y.data) % 64 == 0 &&
         q.batch * q.length * q.heads * q.headdim * size >= large;
}

// The workspace of a forward pass; threads take their scratch one after another behind it.
struct Forward {
  Forward(const SsdScanParams& params, float* memory)
      : q(params),
        z(params),
        arena(memory),
        prepared{{arena, q, z, false}, {arena, q, z, false}},
        side_by_side(chunks_side_by_side(q, q.batch * q.heads)),
        streaming(streams(q)) {
    states = {q.states.at<float>(), q.max_chunks + 1, q.heads, z.state_floats};
    if (!q.states) {
      states.slots = side_by_side ? z.slab + 1 : 1;
      states.base = arena.take(q.batch * states.slots * q.heads * z.state_floats);
    }
    whole = arena.take(q.batch * z.slab * q.heads);
    Arena counter(nullptr);
    Scratch(counter, z);
    scratch_step = counter.used();
    scratch = arena.take(q.threads * scratch_step);
  }
  Scratch of_thread(int thread) const {
    Arena mine(scratch + thread * scratch_step);
    return Scratch(mine, z);
  }

  const Prepared& of_chunk(int64_t c) const { return prepared[c / z.slab % 2]; }

  const SsdScanParams& q;
  Sizes z;
  Arena arena;
  Prepared prepared[2];  // of the slabs in turn: while threads scan one, those with time left prepare the next
  bool side_by_side;
  bool streaming;  // y goes around the caches
  StateRing states;
  float* whole;  // each chunk's decay, where chunks run side by side
  int64_t scratch_step;
  float* scratch;
};

// x in a panel becomes w x, what the chunk's end keeps of it.
inline void weigh(float* x, const Decay& decay, int length) {
  for (int t = 0; t < length; t++)
    for (int v = 0; v < kTileColumns; v += W)
      store(x + t * kTileColumns + v, load(x + t * kTileColumns + v) * splat(decay.weight[t]));
}

// Rows of one panel of y on their way to the caller through the gate, and before it to whom the backward will ask.
template <class T, int Rows>
void store_gated(const Forward& f, const Unit& u, Tile<Rows>& tile, int t0, int panel) {
  const SsdScanParams& q = f.q;
  alignas(64) float rows[Rows * kTileColumns];
  tile_each(tile, [&](int r, int v, vf& acc) { store(rows + r * kTileColumns + v * W, acc); });
  const int column = panel * kTileColumns;
  for (int r = 0; r < std::min(Rows, u.chunk.length - t0); r++) {
    const int64_t t = u.chunk.start + t0 + r;
    for (int v = 0; v < kTileColumns && column + v < f.z.p; v += W) {
      const int left = f.z.p - column - v;
      const vf value = load(rows + r * kTileColumns + v);
      if (q.ungated) store_left(q.ungated.at<float>(u.b, t, u.h) + column + v, value, left);
      const vf z = load_left(q.z.at<T>(u.b, t, u.h) + column + v, left);
      store_left(q.y.at<T>(u.b, t, u.h) + column + v, value * silu(z), left);
    }
  }
}

// The same without a gate.
template <class T, int Rows>
OM_INLINE void store_plain(const Forward& f, const Unit& u, Tile<Rows>& tile, int t0, int panel) {
  const int rows = std::min(Rows, u.chunk.length - t0), columns = f.z.p - panel * kTileColumns;
  const int64_t step = f.q.y.stride[1];
  T* y = f.q.y.at<T>(u.b, u.chunk.start + t0, u.h) + panel * kTileColumns;
  if (f.streaming && rows == Rows) {
    tile_each(tile, [=](int r, int v, vf& acc) { store_around(y + r * step + v * W, acc); });
  } else if (rows == Rows && columns >= kTileColumns) {
    tile_each(tile, [=](int r, int v, vf& acc) { store(y + r * step + v * W, acc); });
  } else {
    tile_each(tile, [=](int r, int v, vf& acc) {
      if (r < rows) store_left(y + r * step + v * W, acc, columns - v * W);
    });
  }
}

// One panel of y = exp(c) (C S) + M x, a tile at a time in the same registers.
template <class T>
void output(const Forward& f, const Unit& u, const Scratch& s, const GroupPack& pack, const float* state, int panel,
            Ahead& ahead) {
  constexpr int part = 32;  // of the states, from one row ahead to the next
  const int length = u.chunk.length;
  const float *x = s.x + panel * panel_floats(), *D = s.D + panel * kTileColumns;
  each_tile(length, [&](auto height, int t0) {
    const float* x0 = x + t0 * kTileColumns;
    Tile<height> tile;
    if (state) {
      const float* from_start = s.decay->from_start + t0;
      for (int k = 0; k < f.z.n; k += part) {
        ahead.row();
        add_states(tile, pack.C_positions, t0, k, std::min(k + part, f.z.n), state, kTileColumns);
      }
      tile_each(tile, [&](int r, int, vf& acc) { acc *= splat(from_start[r]); });
    }
    tile_add<kRow>(tile, std::min(length, t0 + kTileRows), s.M + t0 * kRow, 1, x, kTileColumns);
    tile_each(tile, [&](int r, int v, vf& acc) { acc += load(D + v * W) * load(x0 + r * kTileColumns + v * W); });
    f.q.z ? store_gated<T>(f, u, tile, t0, panel) : store_plain<T>(f, u, tile, t0, panel);
  });
}

// next = exp(c_q) state + B^T (w x) with w x in x's place; without a state, the chunk's own part alone. A strip of B's
// states serves every panel before the next comes into the first cache level.
void advance(const Forward& f, const Unit& u, const Scratch& s, const GroupPack& pack, const float* state, float* next,
             Ahead& ahead) {
  const float whole = s.decay->whole;
  each_tile(f.z.n, [&](auto height, int i) {
    const float *strip = pack.B_states + i * u.chunk.length, *x = s.x;
    int64_t at = i * kTileColumns;
    for (int j = 0; j < f.z.panels; j++, x += panel_floats(), at += f.z.state_panel) {
      ahead.row();
      Tile<height> tile;
      tile_add<1>(tile, u.chunk.length, strip, kTileRows, x, kTileColumns);
      if (state) tile_carry(tile, state + at, whole);
      tile_store(tile, next + at);
    }
  });
}

// The state before a row's first chunk, one panel.
void begin_row(const Forward& f, int64_t b, int64_t h, int panel) {
  const View& v = f.q.initial_states;
  load_state(v.at<float>(b, h), v.stride[2], v.stride[3], f.z, panel, f.states.at(b, 0, h) + panel * f.z.state_panel);
}

// Hands out the state after a chunk, one panel, where the caller wants it.
void hand_out(const Forward& f, const Unit& u, bool last, int panel) {
  const float* state = f.states.at(u.b, u.c + 1, u.h) + panel * f.z.state_panel;
  const View &varlen = f.q.varlen_states, &final = f.q.final_states;
  if (u.chunk.varlen >= 0 && varlen)
    store_state(state, f.z, panel, varlen.at<float>(u.chunk.varlen, u.h), varlen.stride[2], varlen.stride[3]);
  if (last) store_state(state, f.z, panel, final.at<float>(u.b, u.h), final.stride[2], final.stride[3]);
}

template <class T>
void output_padding(const Forward& f, const Unit& u) {
  for (int t = 0; t < u.chunk.length; t++) {
    const int64_t at = u.chunk.start + t;
    for (int c = 0; c < f.z.p; c += W) {
      store_left(f.q.y.at<T>(u.b, at, u.h) + c, vf{}, f.z.p - c);
      if (f.q.ungated) store_left(f.q.ungated.at<float>(u.b, at, u.h) + c, vf{}, f.z.p - c);
    }
  }
}

// `then` is the unit that the thread does next, or null.
template <class T>
void scan_unit(const Forward& f, const Unit& u, const Unit* then, int thread, Work work) {
  float* next = f.states.at(u.b, u.c + 1, u.h);
  if (u.chunk.kind == ChunkKind::Padding) {
    if (work != Work::States) output_padding<T>(f, u);
    if (work != Work::Rest) std::memset(next, 0, sizeof(float) * static_cast<size_t>(f.z.state_floats));
    return;
  }
  Scratch s = f.of_thread(thread);
  const Prepared& prepared = f.of_chunk(u.c);
  GroupPack pack = prepared.group(u.b, u.in_slab, u.h / f.z.per_group);
  const float* state = u.chunk.kind == ChunkKind::Continues ? f.states.at(u.b, u.c, u.h) : nullptr;
  fill_decay(prepared.dt + prepared.head(u.b, u.in_slab, u.h), *f.q.A.at<float>(u.h), u.chunk.length, *s.decay);
  pack_panels(f.q.x.at<T>(u.b, u.chunk.start, u.h), f.q.x.stride[1], u.chunk.length, f.z, s.x);
  if (work != Work::States) {
    fill_scores(*s.decay, pack.G, u.chunk.length, s.M);
    for (int64_t c = 0; c < f.z.p; c++) s.D[c] = f.q.D ? *f.q.D.at<float>(u.h, c) : 0.0f;
  } else {
    f.whole[(u.b * f.z.slab + u.in_slab) * f.q.heads + u.h] = s.decay->whole;
  }
  Ahead ahead;
  if (then) ahead.add<T>(f.q.x, *then, f.z.p);
  if (then && !f.streaming) ahead.add<T>(f.q.y, *then, f.z.p);
  if (u.c + 1 == f.q.max_chunks && work == Work::All) {
    const View& final = f.q.final_states;
    ahead.add(final.at<float>(u.b, u.h), final.stride[2] * 4, f.z.n * 4, f.z.p);
  }
  for (int j = 0; j < f.z.panels; j++) {
    if (work != Work::States) output<T>(f, u, s, pack, state ? state + j * f.z.state_panel : nullptr, j, ahead);
    if (work != Work::Rest) weigh(s.x + j * panel_floats(), *s.decay, u.chunk.length);
  }
  if (work != Work::Rest) advance(f, u, s, pack, work == Work::All ? state : nullptr, next, ahead);
}

// Heads [h0, h1) from their first chunk of the slab to the last; neighbours together, as their rows share pages.
template <class T>
void scan_heads(const Forward& f, int64_t b, int64_t c0, int64_t h0, int64_t h1, int thread) {
  Chunks chunks(f.q, b);
  const int64_t c1 = std::min(c0 + f.z.slab, chunks.count);
  for (int64_t c = c0; c < c1; c++)
    for (int64_t h = h0; h < h1; h++) {
      const Unit u{b, c, h, c - c0, chunks[c]};
      const int64_t then_c = h + 1 < h1 ? c : c + 1;
      const Unit then{b, then_c, h + 1 < h1 ? h + 1 : h0, 0, then_c < c1 ? chunks[then_c] : Chunk{}};
      if (c == 0 && u.chunk.kind == ChunkKind::Continues)
        for (int j = 0; j < f.z.panels; j++) begin_row(f, b, h, j);
      scan_unit<T>(f, u, then_c < c1 ? &then : nullptr, thread, Work::All);
      for (int j = 0; j < f.z.panels; j++) hand_out(f, u, c + 1 == chunks.count, j);
    }
}

// Which tasks of scan_by_heads are done. Who waits here waits for tasks that other threads took before it took its own.
class Progress {
 public:
  Progress(int64_t blocks, int64_t slabs)
      : scanned_(static_cast<size_t>(blocks)),
        prepared_(static_cast<size_t>(slabs)),
        finished_(static_cast<size_t>(slabs)) {}

  void prepare(int64_t slab) { add(prepared_, slab); }
  void scan(int64_t slab, int64_t block) {
    add(scanned_, block);
    add(finished_, slab);
  }
  // Until a slab's step 1 is done, in so many parts, and its block is where it begins.
  void await_start(int64_t slab, int64_t parts, int64_t block) {
    if (slab == 0) return;
    await(prepared_, slab, parts);
    await(scanned_, block, slab);
  }
  // Until nobody reads a slab's step 1 any more.
  void await_end(int64_t slab) {
    if (slab >= 0) await(finished_, slab, static_cast<int64_t>(scanned_.size()));
  }

 private:
  typedef std::vector<std::atomic<int64_t>> Counts;
  static void add(Counts& counts, int64_t i) { counts[static_cast<size_t>(i)].fetch_add(1, std::memory_order_release); }
  static void await(const Counts& counts, int64_t i, int64_t enough) {
    while (counts[static_cast<size_t>(i)].load(std::memory_order_acquire) < enough) std::this_thread::yield();
  }
  Counts scanned_, prepared_, finished_;  // slabs of a block; parts, and blocks, of a slab
};

// All heads, a few to a task: tasks enough to even out the threads. No thread waits at a slab's end for the others: those
// that are ahead go on with the next one, whose step 1 is dealt out amid the tasks before.
template <class T>
void scan_by_heads(const Forward& f) {
  constexpr int64_t tasks_a_thread = 6, most = 8;
  const int64_t heads = f.q.heads;
  const int64_t few = std::clamp<int64_t>(f.q.batch * heads / (tasks_a_thread * f.q.threads), 1, most);
  const int64_t a_row = (heads + few - 1) / few, blocks = f.q.batch * a_row, parts = slab_parts(f.q, f.z);
  const int64_t slabs = (f.q.max_chunks + f.z.slab - 1) / f.z.slab;
  Progress progress(blocks, slabs);
  parallel_tasks(f.q.threads, slabs * (blocks + parts), [&](int64_t task, int thread) {
    const int64_t slab = task / (blocks + parts), i = task % (blocks + parts), c0 = slab * f.z.slab;
    const int64_t part = i - blocks / 2;
    if (part >= 0 && part < parts) {
      if (slab + 1 == slabs) return;
      progress.await_end(slab - 1);
      prepare_part<T>(f.q, f.z, f.of_chunk(c0 + f.z.slab), c0 + f.z.slab, part, thread);
      progress.prepare(slab + 1);
    } else {
      const int64_t block = part < 0 ? i : i - parts, b = block / a_row, h0 = block % a_row * few;
      progress.await_start(slab, parts, block);
      scan_heads<T>(f, b, c0, h0, std::min(h0 + few, heads), thread);
      progress.scan(slab, block);
    }
  });
}

// One unit among all heads and chunks of the slab, which lie side by side.
template <class T>
void scan_unit_at(const Forward& f, int64_t c0, int64_t i, int thread, Work work) {
  int64_t h = i % f.q.heads, in_slab = i / f.q.heads % f.z.slab, b = i / f.q.heads / f.z.slab;
  Chunks chunks(f.q, b);
  if (c0 + in_slab >= chunks.count) return;
  const Unit u{b, c0 + in_slab, h, in_slab, chunks[c0 + in_slab]}, then{b, u.c, h + 1, in_slab, u.chunk};
  scan_unit<T>(f, u, h + 1 < f.q.heads ? &then : nullptr, thread, work);
}

// Adds to each chunk's own state what the chunks before it left.
void join_states(const Forward& f, int64_t c0) {
  parallel_for(f.q.threads, f.q.batch * f.q.heads * f.z.panels, [&](int64_t i, int) {
    int panel = static_cast<int>(i % f.z.panels);
    int64_t h = i / f.z.panels % f.q.heads, b = i / f.z.panels / f.q.heads;
    Chunks chunks(f.q, b);
    if (c0 == 0 && chunks.count && chunks[0].kind == ChunkKind::Continues) begin_row(f, b, h, panel);
    for (int64_t c = c0; c < std::min(c0 + f.z.slab, chunks.count); c++) {
      Unit u{b, c, h, c - c0, chunks[c]};
      const float* state = f.states.at(b, c, h) + panel * f.z.state_panel;
      float* next = f.states.at(b, c + 1, h) + panel * f.z.state_panel;
      const float whole = f.whole[(b * f.z.slab + u.in_slab) * f.q.heads + h];
      if (u.chunk.kind == ChunkKind::Continues)
        for (int64_t k = 0; k < f.z.state_panel; k += W)
          store(next + k, carried(load(state + k), whole, load(next + k)));
      hand_out(f, u, c + 1 == chunks.count, panel);
    }
  });
}

template <class T>
void run(const Forward& f) {
  for (int thread = 0; thread < f.q.threads; thread++)
    std::memset(f.of_thread(thread).M, 0, sizeof(float) * kRow * kRow);
  const int64_t outputs = f.q.batch * f.q.length * f.q.heads * f.q.headdim;
  claim_pages(f.q.y.data, outputs * static_cast<int64_t>(sizeof(T)), f.q.threads);
  if (f.q.states)
    claim_pages(f.states.base, f.q.batch * f.states.slots * f.q.heads * f.z.state_floats * 4, f.q.threads);
  prepare_slab<T>(f.q, f.z, f.of_chunk(0), 0);
  if (!f.side_by_side) return scan_by_heads<T>(f);
  const int64_t units = f.q.batch * f.z.slab * f.q.heads;
  for (int64_t c0 = 0; c0 < f.q.max_chunks; c0 += f.z.slab) {
    const int64_t next = c0 + f.z.slab, parts = next < f.q.max_chunks ? slab_parts(f.q, f.z) : 0;
    parallel_tasks(f.q.threads, units, [&](int64_t i, int thread) { scan_unit_at<T>(f, c0, i, thread, Work::States); });
    join_states(f, c0);
    parallel_tasks(f.q.threads, units + parts, [&](int64_t i, int thread) {
      if (i < units) return scan_unit_at<T>(f, c0, i, thread, Work::Rest);
      prepare_part<T>(f.q, f.z, f.of_chunk(next), next, i - units, thread);  // by who has time left
    });
  }
}

}  // namespace
}  // namespace ssd

int64_t ssd_scan_state_floats(const SsdScanParams& q) { return ssd::Sizes(q).state_floats; }

int64_t ssd_scan_forward_workspace(const SsdScanParams& q) { return ssd::Forward(q, nullptr).arena.used(); }

void ssd_scan_forward(const SsdScanParams& q) {
  ssd::Forward forward(q, q.workspace.at<float>());
  for_float_type(q.x.dtype, [&](auto zero) { ssd::run<decltype(zero)>(forward); });
}

}  // namespace omnimamba
