// Cross-entropy of few classes (CIFAR, Fashion-MNIST): one row per SIMD lane. A tile of rows is
// transposed, so that every lane is full whatever C is. Reads and writes each logit once.
#include "fastis.h"
#include "loss.h"

namespace fastis::FASTIS_ISA {

namespace {

typedef float Quad __attribute__((vector_size(16)));

// A 4 x 4 block: rows src_stride apart in, rows dst_stride apart out.
inline void transpose_block(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
  Quad r[4];
  for (int i = 0; i < 4; ++i) std::memcpy(&r[i], src + i * src_stride, sizeof(Quad));
  const Quad a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5);
  const Quad b = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
  const Quad c = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
  const Quad d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
  r[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
  r[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
  r[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
  r[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
  for (int i = 0; i < 4; ++i) std::memcpy(dst + i * dst_stride, &r[i], sizeof(Quad));
}

// dst[c][r] = src[r][c] for `rows` x `columns`; a multiple of 4 in one of them takes blocks, the
// last of which overlaps its neighbour where the other is ragged.
template <class F>
inline void transpose(const F* src, int64_t src_stride, F* dst, int64_t dst_stride, int rows,
                      int columns) {
  if constexpr (sizeof(F) == 4) {
    if (rows >= 4 && columns >= 4) {
      for (int r = 0; r < rows; r += 4) {
        const int row = r + 4 <= rows ? r : rows - 4;
        for (int c = 0; c < columns; c += 4) {
          const int column = c + 4 <= columns ? c : columns - 4;
          transpose_block(src + row * src_stride + column, src_stride,
                          dst + column * dst_stride + row, dst_stride);
        }
      }
      return;
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) dst[c * dst_stride + r] = src[r * src_stride + c];
  }
}

// What the lanes need beside their logits: label, r_i w_y (0 where ignored), w_y.
template <class F>
struct RowLanes {
  Mask<F> label;
  Vec<F> scale, class_weight;
};

template <class S, class F = Compute<S>>
inline RowLanes<F> row_lanes(const Problem<S>& p, int64_t row, int count) {
  using Int = typename Simd<F>::Int;
  RowLanes<F> lanes{};
  for (int i = 0; i < count; ++i) {
    if (p.ignored(row + i)) continue;
    const int64_t y = p.target[row + i];
    lanes.label[i] = static_cast<Int>(y);
    lanes.class_weight[i] = p.class_weight(y);
    lanes.scale[i] = p.coefficient(row + i) * lanes.class_weight[i] * p.inverse_denominator;
  }
  return lanes;
}

// A tile [C, lanes] of logits becomes the scaled gradient.
template <class F>
inline RowResult<Vec<F>> solve_tile(F* tile, int C, const RowLanes<F>& lanes, Mask<F> live) {
  using Int = typename Simd<F>::Int;
  constexpr int V = kLanes<F>;
  const Vec<F> lowest = splat<F>(-F(__builtin_inf()));
  Vec<F> m = lowest, z_y{};
  for (int c = 0; c < C; ++c) {
    const Vec<F> z = load(tile + c * V);
    const auto is_label = lanes.label == static_cast<Int>(c);
    m = max<F>(select<F>(is_label, lowest, z), m);
    z_y = select<F>(is_label, z, z_y);
  }
  m = safe_max<F>(m, z_y);
  Vec<F> s{}, q{};
  for (int c = 0; c < C; ++c) {
    Vec<F> e = exp_term(load(tile + c * V) - m);
    e = select<F>(lanes.label == static_cast<Int>(c), splat<F>(0), e);
    s += e;
    q = fma<F>(e, e, q);
    store(tile + c * V, e);
  }
  RowResult<Vec<F>> rows = finish_rows<F>(z_y, m, s, q);
  const Vec<F> zero{};
  const Vec<F> scale = select<F>(live, rows.p_scale * lanes.scale, zero);
  const Vec<F> at_label = -s * scale;
  for (int c = 0; c < C; ++c) {
    const auto is_label = lanes.label == static_cast<Int>(c);
    const Vec<F> g = select<F>(is_label, at_label, load(tile + c * V) * scale);
    store(tile + c * V, select<F>(live, g, zero));
  }
  rows.loss = select<F>(live, rows.loss * lanes.class_weight, zero);
  rows.norm = select<F>(live, rows.norm * max<F>(lanes.class_weight, -lanes.class_weight), zero);
  return rows;
}

// Lanes whose row exists and is not ignored.
template <class S, class F = Compute<S>>
inline Mask<F> live_lanes(const Problem<S>& p, int64_t row, int count) {
  Mask<F> live{};
  for (int i = 0; i < count; ++i) live[i] = p.ignored(row + i) ? 0 : -1;
  return live;
}

template <class S, class F>
inline void read_tile(const Problem<S>& p, int64_t row, int count, F* tile, F* stage) {
  const S* logits = p.logits + row * p.row_stride;
  const int C = static_cast<int>(p.C);
  constexpr int V = kLanes<F>;
  if constexpr (sizeof(S) == sizeof(F)) {
    if (count == V) return transpose(logits, p.row_stride, tile, V, V, C);
  }
  std::memset(static_cast<void*>(stage), 0, sizeof(F) * V * C);
  for (int i = 0; i < count; ++i) {
    const S* z = logits + i * p.row_stride;
    int c = 0;
    for (; c + V <= C; c += V) store(stage + i * C + c, load(z + c));
    if (c < C) store_some(stage + i * C + c, load_some(z + c, C - c, F(0)), C - c);
  }
  transpose(stage, C, tile, V, V, C);
}

template <class S, class F>
inline void write_tile(const Problem<S>& p, int64_t row, int count, const F* tile, F* stage) {
  using G = typename Format<S>::Grad;
  G* grad = p.grad + row * p.C;
  const int C = static_cast<int>(p.C);
  constexpr int V = kLanes<F>;
  if constexpr (sizeof(G) == sizeof(F)) {
    if (count == V) return transpose(tile, V, grad, C, C, V);
  }
  transpose(tile, V, stage, C, C, V);
  const int total = count * C;
  int at = 0;
  for (; at + V <= total; at += V) store(grad + at, load(stage + at));
  if (at < total) store_some(grad + at, load(stage + at), total - at);
}

}  // namespace

template <class S>
void rows_of_few_classes(const Problem<S>& p, int64_t begin, int64_t end, Compute<S>* column_sum) {
  using F = Compute<S>;
  constexpr int V = kLanes<F>;
  const int C = static_cast<int>(p.C);
  alignas(64) F tile[kFewClasses * V], stage[kFewClasses * V + V], sums[kFewClasses * V];
  for (int i = 0; i < C * V; ++i) sums[i] = 0;
  for (int64_t row = begin; row < end; row += V) {
    const int count = static_cast<int>(end - row < V ? end - row : V);
    read_tile(p, row, count, tile, stage);
    const RowResult<Vec<F>> rows =
        solve_tile<F>(tile, C, row_lanes(p, row, count), live_lanes(p, row, count));
    store_some(p.row_loss + row, rows.loss, count);
    store_some(p.row_norm + row, rows.norm, count);
    if (column_sum != nullptr) {
      for (int i = 0; i < C * V; i += V) store(sums + i, load(sums + i) + load(tile + i));
    }
    if (p.grad != nullptr) write_tile(p, row, count, tile, stage);
  }
  for (int c = 0; column_sum != nullptr && c < C; ++c) {
    column_sum[c] += reduce_add<F>(load(sums + c * V));
  }
}

template void rows_of_few_classes(const Problem<float>&, int64_t, int64_t, float*);
template void rows_of_few_classes(const Problem<double>&, int64_t, int64_t, double*);
template void rows_of_few_classes(const Problem<BFloat16>&, int64_t, int64_t, float*);
template void rows_of_few_classes(const Problem<Float16>&, int64_t, int64_t, float*);

}  // namespace fastis::FASTIS_ISA
