// Cross-entropy of few classes (CIFAR, Fashion-MNIST): one row per SIMD lane. A tile of rows is
// transposed, so that every lane is full whatever C is. Reads and writes each logit once.
#include "fastis.h"
#include "loss.h"
#include "transpose.h"

namespace fastis::FASTIS_ISA {

namespace {

// Several vectors of rows per tile: the long chains of finish_rows overlap.
template <class F>
constexpr int kTile = 4 * kLanes<F>;

// Row-wise vectors of a tile of W = kTile rows.
template <class F>
struct alignas(64) Tile {
  F z[kFewClasses * kTile<F>];      // [C, W] logits, then exponentials
  F stage[kFewClasses * kTile<F>];  // [W, C] where memory has another format or too few rows
  F z_label[kTile<F>], scale[kTile<F>], class_weight[kTile<F>], at_label[kTile<F>];
  F m[kTile<F>], s[kTile<F>], q[kTile<F>];
  F loss[kTile<F>], norm[kTile<F>];
  int32_t label[kTile<F>];
};

template <class S, class F>
inline void read_tile(const Problem<S>& p, int64_t row, int count, Tile<F>& tile) {
  const S* logits = p.logits + row * p.row_stride;
  const int C = static_cast<int>(p.C);
  constexpr int V = kLanes<F>, W = kTile<F>;
  if constexpr (sizeof(S) == sizeof(F)) {
    if (count == W) return rows_to_lanes(logits, p.row_stride, W, C, tile.z, W);
  }
  for (int i = 0; i < count; ++i) {
    const S* z = logits + i * p.row_stride;
    int c = 0;
    for (; c + V <= C; c += V) store(tile.stage + i * C + c, load(z + c));
    if (c < C) store_some(tile.stage + i * C + c, load_some(z + c, C - c, F(0)), C - c);
  }
  for (int i = count * C; i < W * C; ++i) tile.stage[i] = 0;
  rows_to_lanes(tile.stage, C, W, C, tile.z, W);
}

// Takes the label's logit out of the tile and leaves -inf.
template <class F>
inline void take_label(Tile<F>& tile, int i, int32_t y) {
  F& z = tile.z[y * kTile<F> + i];
  tile.label[i] = y;
  tile.z_label[i] = z;
  z = -F(__builtin_inf());
}

// Labels and scales. Rows that are ignored or do not exist become zero terms.
template <class S, class F>
inline void read_rows(const Problem<S>& p, int64_t row, int count, Tile<F>& tile) {
  constexpr int W = kTile<F>;
  if (count == W && !p.any_ignored && p.class_weights == nullptr && p.weights == nullptr) {
    const F scale = p.inverse_denominator;
    for (int i = 0; i < W; ++i) tile.class_weight[i] = 1;
    for (int i = 0; i < W; ++i) tile.scale[i] = scale;
    const int64_t* target = p.target + row;
    for (int i = 0; i < W; ++i) take_label(tile, i, static_cast<int32_t>(target[i]));
    return;
  }
  for (int i = 0; i < W; ++i) {
    const bool dead = i >= count || p.ignored(row + i);
    const int64_t y = dead ? 0 : p.target[row + i];
    for (int c = 0; dead && c < p.C; ++c) tile.z[c * W + i] = 0;
    const F w = dead ? F(0) : p.class_weight(y);
    tile.class_weight[i] = w;
    tile.scale[i] = dead ? F(0) : p.coefficient(row + i) * w * p.inverse_denominator;
    take_label(tile, i, static_cast<int32_t>(y));
  }
}

// Exponentials and their sums over j != y.
template <class F>
inline void sum_tile(Tile<F>& tile, int C) {
  constexpr int V = kLanes<F>, W = kTile<F>;
  for (int i = 0; i < W; i += V) {
    Vec<F> m = load(tile.z + i);
    for (int c = 1; c < C; ++c) m = max<F>(load(tile.z + c * W + i), m);
    m = safe_max<F>(m, load(tile.z_label + i));
    Vec<F> s{}, q{};
    for (int c = 0; c < C; ++c) {
      const Vec<F> e = exp_term(load(tile.z + c * W + i) - m);
      s += e;
      q = fma<F>(e, e, q);
      store(tile.z + c * W + i, e);
    }
    store(tile.m + i, m);
    store(tile.s + i, s);
    store(tile.q + i, q);
  }
}

template <class F>
inline void finish_tile(Tile<F>& tile) {
  constexpr int V = kLanes<F>, W = kTile<F>;
  for (int i = 0; i < W; i += V) {
    const Vec<F> s = load(tile.s + i), w = load(tile.class_weight + i);
    const RowResult<Vec<F>> rows =
        finish_rows<F>(load(tile.z_label + i), load(tile.m + i), s, load(tile.q + i));
    const Vec<F> scale = rows.p_scale * load(tile.scale + i);
    store(tile.scale + i, scale);
    store(tile.at_label + i, -s * scale);
    store(tile.loss + i, rows.loss * w);
    store(tile.norm + i, rows.norm * max<F>(w, -w));
  }
}

// Adds the scaled gradient's columns to `sums` [C, V].
template <class F>
inline void sum_columns(const Tile<F>& tile, int C, F* sums) {
  constexpr int V = kLanes<F>, W = kTile<F>;
  Vec<F> scale[W / V];
  for (int i = 0; i < W / V; ++i) scale[i] = load(tile.scale + i * V);
  for (int c = 0; c < C; ++c) {
    Vec<F> sum = load(sums + c * V);
    for (int i = 0; i < W / V; ++i) {
      sum = fma<F>(load(tile.z + c * W + i * V), scale[i], sum);
    }
    store(sums + c * V, sum);
  }
  for (int i = 0; i < W; ++i) sums[tile.label[i] * V + i % V] += tile.at_label[i];
}

template <class S, class F>
inline void write_tile(const Problem<S>& p, int64_t row, int count, Tile<F>& tile) {
  using G = Grad<S>;
  G* grad = p.grad + row * p.C;
  const int C = static_cast<int>(p.C);
  constexpr int V = kLanes<F>, W = kTile<F>;
  if constexpr (sizeof(G) == sizeof(F)) {
    if (count == W) {
      lanes_to_rows(tile.z, W, tile.scale, W, C, grad);
      for (int i = 0; i < W; ++i) grad[i * C + tile.label[i]] = tile.at_label[i];
      return;
    }
  }
  lanes_to_rows(tile.z, W, tile.scale, W, C, tile.stage);
  for (int i = 0; i < W; ++i) tile.stage[i * C + tile.label[i]] = tile.at_label[i];
  const int total = count * C;
  int at = 0;
  for (; at + V <= total; at += V) store(grad + at, load(tile.stage + at));
  for (; at < total; ++at) store_some(grad + at, splat<F>(tile.stage[at]), 1);
}

}  // namespace

template <class S>
void rows_of_few_classes(const Problem<S>& p, const Chunk<Compute<S>>& chunk) {
  using F = Compute<S>;
  constexpr int V = kLanes<F>, W = kTile<F>;
  const int C = static_cast<int>(p.C);
  Tile<F> tile;
  alignas(64) F sums[kFewClasses * V];
  for (int i = 0; i < C * V; ++i) sums[i] = 0;
  for (int64_t row = chunk.begin; row < chunk.end; row += W) {
    const int count = static_cast<int>(chunk.end - row < W ? chunk.end - row : W);
    read_tile(p, row, count, tile);
    read_rows(p, row, count, tile);
    sum_tile(tile, C);
    finish_tile(tile);
    std::memcpy(p.row_loss + row, tile.loss, sizeof(F) * count);
    std::memcpy(p.row_norm + row, tile.norm, sizeof(F) * count);
    if (chunk.column_sum != nullptr) sum_columns(tile, C, sums);
    if (p.grad != nullptr) write_tile(p, row, count, tile);
  }
  for (int c = 0; chunk.column_sum != nullptr && c < C; ++c) {
    chunk.column_sum[c] += reduce_add<F>(load(sums + c * V));
  }
}

template void rows_of_few_classes(const Problem<float>&, const Chunk<float>&);
template void rows_of_few_classes(const Problem<double>&, const Chunk<double>&);
template void rows_of_few_classes(const Problem<BFloat16>&, const Chunk<float>&);
template void rows_of_few_classes(const Problem<Float16>&, const Chunk<float>&);

}  // namespace fastis::FASTIS_ISA
