// Transposes between rows of few columns and lanes of rows, in registers: 4 x 4 blocks, two side by
// side where the vectors are wide enough.
#pragma once

#include "simd.h"

namespace fastis::FASTIS_ISA {

typedef float Quad __attribute__((vector_size(16)));

inline Quad load_quad(const float* p) { return load_as<Quad>(p); }

#if FASTIS_VECTOR_BYTES >= 32
constexpr int kBlock = 8;
typedef float BlockRow __attribute__((vector_size(32)));

// Rows i and i + 4 of a block side by side.
inline BlockRow load_pair(const float* p, int64_t stride) {
  return __builtin_shufflevector(load_quad(p), load_quad(p + 4 * stride), 0, 1, 2, 3, 4, 5, 6, 7);
}
inline void store_pair(float* p, int64_t stride, BlockRow x) {
  const Quad low = __builtin_shufflevector(x, x, 0, 1, 2, 3);
  const Quad high = __builtin_shufflevector(x, x, 4, 5, 6, 7);
  store_as(p, low);
  store_as(p + 4 * stride, high);
}
inline void transpose_registers(BlockRow (&r)[4]) {
  const BlockRow a = __builtin_shufflevector(r[0], r[1], 0, 8, 1, 9, 4, 12, 5, 13);
  const BlockRow b = __builtin_shufflevector(r[0], r[1], 2, 10, 3, 11, 6, 14, 7, 15);
  const BlockRow c = __builtin_shufflevector(r[2], r[3], 0, 8, 1, 9, 4, 12, 5, 13);
  const BlockRow d = __builtin_shufflevector(r[2], r[3], 2, 10, 3, 11, 6, 14, 7, 15);
  r[0] = __builtin_shufflevector(a, c, 0, 1, 8, 9, 4, 5, 12, 13);
  r[1] = __builtin_shufflevector(a, c, 2, 3, 10, 11, 6, 7, 14, 15);
  r[2] = __builtin_shufflevector(b, d, 0, 1, 8, 9, 4, 5, 12, 13);
  r[3] = __builtin_shufflevector(b, d, 2, 3, 10, 11, 6, 7, 14, 15);
}
#else
constexpr int kBlock = 4;
typedef Quad BlockRow;

inline BlockRow load_pair(const float* p, int64_t) { return load_quad(p); }
inline void store_pair(float* p, int64_t, BlockRow x) { store_as(p, x); }
inline void transpose_registers(BlockRow (&r)[4]) {
  const Quad a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5);
  const Quad b = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
  const Quad c = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
  const Quad d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
  r[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
  r[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
  r[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
  r[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
}
#endif

// lanes[c][r] = rows[r][c] for `count` rows, a multiple of kBlock. The last block of ragged columns
// overlaps its neighbour.
template <class F>
inline void rows_to_lanes(const F* rows, int64_t row_stride, int count, int columns, F* lanes,
                          int64_t lane_stride) {
  if constexpr (sizeof(F) == 4) {
    for (int r = 0; columns >= 4 && r < count; r += kBlock) {
      for (int c = 0; c < columns; c += 4) {
        const int column = c + 4 <= columns ? c : columns - 4;
        const float* from = rows + r * row_stride + column;
        BlockRow block[4];
        for (int i = 0; i < 4; ++i) block[i] = load_pair(from + i * row_stride, row_stride);
        transpose_registers(block);
        float* to = lanes + column * lane_stride + r;
        for (int i = 0; i < 4; ++i) store_as(to + i * lane_stride, block[i]);
      }
    }
    if (columns >= 4) return;
  }
  for (int r = 0; r < count; ++r) {
    for (int c = 0; c < columns; ++c) lanes[c * lane_stride + r] = rows[r * row_stride + c];
  }
}

// rows[r][c] = scale[r] lanes[c][r], the way back; rows are `columns` apart.
template <class F>
inline void lanes_to_rows(const F* lanes, int64_t lane_stride, const F* scale, int count,
                          int columns, F* rows) {
  if constexpr (sizeof(F) == 4) {
    for (int r = 0; columns >= 4 && r < count; r += kBlock) {
      const BlockRow factor = load_as<BlockRow>(scale + r);
      for (int c = 0; c < columns; c += 4) {
        const int column = c + 4 <= columns ? c : columns - 4;
        BlockRow block[4];
        const float* from = lanes + column * lane_stride + r;
        for (int i = 0; i < 4; ++i) block[i] = load_as<BlockRow>(from + i * lane_stride) * factor;
        transpose_registers(block);
        float* to = rows + int64_t(r) * columns + column;
        for (int i = 0; i < 4; ++i) store_pair(to + i * columns, columns, block[i]);
      }
    }
    if (columns >= 4) return;
  }
  for (int r = 0; r < count; ++r) {
    for (int c = 0; c < columns; ++c) rows[r * columns + c] = scale[r] * lanes[c * lane_stride + r];
  }
}

}  // namespace fastis::FASTIS_ISA
