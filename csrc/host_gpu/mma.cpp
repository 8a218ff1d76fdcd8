#include "../common/mma.cuh"

namespace omnimamba::host_gpu {

void load_matrices(uint32_t* out, int count, bool transposed, const void* row) {
  // A lane's row is read when that lane comes, so that a sync_warp missing before it shows.
  struct Argument {
    uint16_t row[8];
    uint32_t* out;
  } mine{{}, out};
  if (self().linear % 32 < 8 * count) {
    check_aligned(row, 16, "load_matrices");
    check_shared(row, 16, "load_matrices");
    std::memcpy(mine.row, row, 16);
  }
  together(transposed ? "load_matrices, transposed" : "load_matrices", 0xffffffffu, mine, [=](Argument** all) {
    for (int j = 0; j < count; j++)
      for (int lane = 0; lane < 32; lane++) {
        uint32_t halves[2];
        for (int i = 0; i < 2; i++) {
          Place at = fragment::loaded(lane, i);
          if (transposed) at = {at.column, at.row};
          halves[i] = all[8 * j + at.row]->row[at.column];
        }
        all[lane]->out[j] = halves[0] | halves[1] << 16;
      }
  });
}

void store_matrices(void* row, bool transposed, const uint32_t (&from)[4]) {
  struct Argument {
    uint16_t* row;
    const uint32_t* from;
  } mine{static_cast<uint16_t*>(row), from};
  check_aligned(row, 16, "store_matrices");
  check_shared(row, 16, "store_matrices");
  together(transposed ? "store_matrices, transposed" : "store_matrices", 0xffffffffu, mine, [=](Argument** all) {
    for (int j = 0; j < 4; j++)
      for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 2; i++) {
          Place at = fragment::loaded(lane, i);
          if (transposed) at = {at.column, at.row};
          all[8 * j + at.row]->row[at.column] = static_cast<uint16_t>(all[lane]->from[j] >> 16 * i);
        }
  });
  wrote(row, 16);  // a fence of any lane alone leaves the others' rows out
}

void multiply(const char* name, const Multiply& mine, int k) {
  Multiply argument = mine;
  together(name, 0xffffffffu, argument, [=](Multiply** all) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
      for (int i = 0; i < k / 2; i++) {
        const Place at = k == 16 ? fragment::a16(lane, i) : fragment::a32(lane, i);
        a[at.row][at.column] = all[lane]->a[i];
      }
      for (int i = 0; i < k / 4; i++) {
        const Place at = k == 16 ? fragment::b16(lane, i) : fragment::b32(lane, i);
        b[at.row][at.column] = all[lane]->b[i];
      }
    }
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) {
        const Place at = fragment::c(lane, i);
        float sum = all[lane]->c[i];
        for (int j = 0; j < k; j++) sum += a[at.row][j] * b[j][at.column];
        all[lane]->c[i] = sum;
      }
  });
}

float clear_low_bits(float a, int bits) { return float_of(bits_of(a) >> bits << bits); }

}  // namespace omnimamba::host_gpu
