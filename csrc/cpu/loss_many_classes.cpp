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

template <class F>
struct Group {
  F m[kLanes<F> + kGroup], s[kLanes<F> + kGroup], q[kLanes<F> + kGroup];
  F z_label[kLanes<F> + kGroup], p_scale[kLanes<F> + kGroup];
  F loss[kLanes<F> + kGroup], norm[kLanes<F> + kGroup];
};

template <class F>
inline void finish_group(Group<F>& group, int count) {
  for (int i = 0; i < count; i += kLanes<F>) {
    const Vec<F> z_label = load(group.z_label + i);
    const auto rows =
        finish_rows<F>(z_label, load(group.m + i), load(group.s + i), load(group.q + i));
    store(group.loss + i, rows.loss);
    store(group.norm + i, rows.norm);
    store(group.p_scale + i, rows.p_scale);
  }
}

// What the gradient of a group of rows is written from; a dead (ignored) row has scale 0.
template <class G, class F>
struct GradRows {
  const F* e;  // [count, stride]
  int64_t stride, C;
  G* grad;        // [count, C] or null
  F* column_sum;  // [C] or null
  F scale[kGroup], at_label[kGroup];
  int64_t label[kGroup];
};

template <int count, class G, class F>
inline void write_rows(const GradRows<G, F>& rows) {
  constexpr int V = kLanes<F>;
  const int64_t C = rows.C;
  for (int64_t c = 0; c < C; c += V) {
    const int some = static_cast<int>(C - c < V ? C - c : V);
    Vec<F> sum{};
    for (int i = 0; i < count; ++i) {
      const Vec<F> g = load(rows.e + i * rows.stride + c) * rows.scale[i];
      sum += g;
      if (rows.grad == nullptr) continue;
      G* to = rows.grad + i * C + c;
      if (some == V) {
        store(to, g);
      } else {
        store_some(to, g, some);
      }
    }
    if (rows.column_sum == nullptr) continue;
    F* to = rows.column_sum + c;
    if (some == V) {
      store(to, load(to) + sum);
    } else {
      store_some(to, load_some(to, some, F(0)) + sum, some);
    }
  }
  for (int i = 0; i < count; ++i) {
    if (rows.grad != nullptr) {
      store_some(rows.grad + i * C + rows.label[i], splat<F>(rows.at_label[i]), 1);
    }
    if (rows.column_sum != nullptr) rows.column_sum[rows.label[i]] += rows.at_label[i];
  }
}

// Fills row i of the group; an ignored row gets exponentials 0 and label 0.
template <class S, class G, class F>
inline void sum_row(const Problem<S>& p, int64_t row, int i, F* e, Group<F>& group,
                    GradRows<G, F>& out) {
  const bool dead = p.ignored(row);
  out.label[i] = dead ? 0 : p.target[row];
  if (dead) {
    std::memset(static_cast<void*>(e), 0, sizeof(F) * out.stride);
    group.z_label[i] = group.m[i] = group.s[i] = group.q[i] = 0;
    return;
  }
  const int64_t y = out.label[i];
  const S* z = p.logits + row * p.row_stride;
  const Vec<F> z_y = load_some(z + y, 1, F(0));
  const Vec<F> m = safe_max<F>(splat<F>(max_of_others(z, p.C, y)), z_y);
  const Sums<F> sums = exponentials(z, p.C, y, F(m[0]), e);
  group.z_label[i] = z_y[0];
  group.m[i] = m[0];
  group.s[i] = reduce_add<F>(sums.s);
  group.q[i] = reduce_add<F>(sums.q);
}

template <class S, class G, class F>
inline void finish_row(const Problem<S>& p, int64_t row, int i, const Group<F>& group,
                       GradRows<G, F>& out) {
  const F w = p.ignored(row) ? F(0) : p.class_weight(out.label[i]);
  p.row_loss[row] = group.loss[i] * w;
  p.row_norm[row] = group.norm[i] * (w < 0 ? -w : w);
  out.scale[i] = group.p_scale[i] * w * p.coefficient(row) * p.inverse_denominator;
  out.at_label[i] = -group.s[i] * out.scale[i];
}

}  // namespace

template <class S>
void rows_of_many_classes(const Problem<S>& p, const Chunk<Compute<S>>& chunk) {
  using F = Compute<S>;
  using G = Grad<S>;
  const int64_t stride = padded<F>(p.C);
  const int together = rows_together(p.C);
  F* const e = chunk.scratch;
  Group<F> group{};
  GradRows<G, F> out{e, stride, p.C, nullptr, chunk.column_sum, {}, {}, {}};
  for (int64_t row = chunk.begin; row < chunk.end;) {
    const int count = chunk.end - row >= together ? together : 1;
    for (int i = 0; i < count; ++i) sum_row(p, row + i, i, e + i * stride, group, out);
    finish_group(group, count);
    for (int i = 0; i < count; ++i) finish_row(p, row + i, i, group, out);
    if (p.grad != nullptr) out.grad = p.grad + row * p.C;
    if (p.grad != nullptr || chunk.column_sum != nullptr) {
      if (count == kGroup) {
        write_rows<kGroup>(out);
      } else {
        write_rows<1>(out);
      }
    }
    row += count;
  }
}

template void rows_of_many_classes(const Problem<float>&, const Chunk<float>&);
template void rows_of_many_classes(const Problem<double>&, const Chunk<double>&);
template void rows_of_many_classes(const Problem<BFloat16>&, const Chunk<float>&);
template void rows_of_many_classes(const Problem<Float16>&, const Chunk<float>&);

}  // namespace fastis::FASTIS_ISA
