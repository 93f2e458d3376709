// Cross-entropy of many classes (ImageNet, vocabularies): SIMD lanes over the classes of one row.
// Two passes over the logits, the second from cache, and one over a scratch row of exponentials.
#include "fastis.h"
#include "loss.h"

namespace fastis::FASTIS_ISA {

namespace {

// max over [begin, end), a multiple of the lanes, in four chains.
template <class S, class F = Compute<S>>
inline Vec<F> max_between(const S* z, int64_t begin, int64_t end, Vec<F> m0) {
  constexpr int V = kLanes<F>;
  Vec<F> m1 = m0, m2 = m0, m3 = m0;
  int64_t c = begin;
  for (; c + 4 * V <= end; c += 4 * V) {
    m0 = max<F>(load(z + c), m0);
    m1 = max<F>(load(z + c + V), m1);
    m2 = max<F>(load(z + c + 2 * V), m2);
    m3 = max<F>(load(z + c + 3 * V), m3);
  }
  for (; c < end; c += V) m0 = max<F>(load(z + c), m0);
  return max<F>(max<F>(m0, m1), max<F>(m2, m3));
}

// The block of classes at `c`, with -inf past the end and at the label.
template <class S, class F = Compute<S>>
inline Vec<F> odd_block(const S* z, int64_t c, int64_t C, int64_t y) {
  using Int = typename Simd<F>::Int;
  constexpr int V = kLanes<F>;
  const F lowest = -F(__builtin_inf());
  const Vec<F> v = C - c >= V ? load(z + c) : load_some(z + c, static_cast<int>(C - c), lowest);
  return select<F>(iota<F>() + static_cast<Int>(c) == static_cast<Int>(y), splat<F>(lowest), v);
}

template <class S, class F = Compute<S>>
inline F max_of_others(const S* z, int64_t C, int64_t y) {
  constexpr int V = kLanes<F>;
  const int64_t full = C / V * V, label_block = y / V * V;
  Vec<F> m = max_between(z, 0, label_block, odd_block(z, label_block, C, y));
  if (label_block < full) m = max_between(z, label_block + V, full, m);
  if (full < C) m = max<F>(odd_block(z, full, C, y), m);
  return reduce_max<F>(m);
}

template <class F>
struct Sums {
  Vec<F> s, q;
};

// e[c] = exp(z_c - m), 0 at the label, [C rounded up to the lanes].
template <class S, class F = Compute<S>>
inline Sums<F> exponentials(const S* z, int64_t C, int64_t y, F m, F* e) {
  constexpr int V = kLanes<F>;
  const int64_t full = C / V * V, label_block = y / V * V;
  Sums<F> sums{};
  const auto add = [&](int64_t c, Vec<F> v) __attribute__((always_inline)) {
    const Vec<F> term = exp_term(v - m);
    sums.s += term;
    sums.q = fma<F>(term, term, sums.q);
    store(e + c, term);
  };
  const int64_t before = label_block < full ? label_block : full;
  for (int64_t c = 0; c < before; c += V) add(c, load(z + c));
  if (label_block < full) add(label_block, odd_block(z, label_block, C, y));
  for (int64_t c = before + V; c < full; c += V) add(c, load(z + c));
  if (full < C) add(full, odd_block(z, full, C, y));
  return sums;
}

// grad = e * scale with at_label at y; the same into column_sum.
template <class G, class F>
inline void write_row(const F* e, int64_t C, int64_t y, F scale, F at_label, G* grad,
                      F* column_sum) {
  constexpr int V = kLanes<F>;
  const int64_t full = C / V * V;
  const int rest = static_cast<int>(C - full);
  if (grad != nullptr) {
    for (int64_t c = 0; c < full; c += V) store(grad + c, load(e + c) * scale);
    if (rest > 0) store_some(grad + full, load(e + full) * scale, rest);
    Vec<F> label = splat<F>(at_label);
    store_some(grad + y, label, 1);
  }
  if (column_sum != nullptr) {
    for (int64_t c = 0; c < full; c += V) {
      store(column_sum + c, fma<F>(load(e + c), splat<F>(scale), load(column_sum + c)));
    }
    for (int64_t c = full; c < C; ++c) column_sum[c] += e[c] * scale;
    column_sum[y] += at_label;
  }
}

}  // namespace

template <class S>
void rows_of_many_classes(const Problem<S>& p, int64_t begin, int64_t end, Compute<S>* column_sum) {
  using F = Compute<S>;
  constexpr int V = kLanes<F>;
  const Scratch<F> e((p.C + V - 1) / V * V);
  for (int64_t row = begin; row < end; ++row) {
    auto* grad = p.grad != nullptr ? p.grad + row * p.C : nullptr;
    if (p.ignored(row)) {
      zero_row(grad, p.C);
      p.row_loss[row] = p.row_norm[row] = 0;
      continue;
    }
    const S* z = p.logits + row * p.row_stride;
    const int64_t y = p.target[row];
    const Vec<F> z_y = load_some(z + y, 1, F(0));
    const Vec<F> m = safe_max<F>(splat<F>(max_of_others(z, p.C, y)), splat<F>(z_y[0]));
    const Sums<F> sums = exponentials(z, p.C, y, F(m[0]), static_cast<F*>(e));
    const F s = reduce_add<F>(sums.s), q = reduce_add<F>(sums.q);
    const auto result = finish_rows<F>(splat<F>(z_y[0]), m, splat<F>(s), splat<F>(q));
    const F w = p.class_weight(y);
    p.row_loss[row] = result.loss[0] * w;
    p.row_norm[row] = result.norm[0] * (w < 0 ? -w : w);
    const F scale = result.p_scale[0] * w * p.coefficient(row) * p.inverse_denominator;
    write_row(static_cast<F*>(e), p.C, y, scale, -s * scale, grad, column_sum);
  }
}

template void rows_of_many_classes(const Problem<float>&, int64_t, int64_t, float*);
template void rows_of_many_classes(const Problem<double>&, int64_t, int64_t, double*);
template void rows_of_many_classes(const Problem<BFloat16>&, int64_t, int64_t, float*);
template void rows_of_many_classes(const Problem<Float16>&, int64_t, int64_t, float*);

}  // namespace fastis::FASTIS_ISA
