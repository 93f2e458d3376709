// Cross-entropy against soft targets t: probabilities or smoothed labels,
//   t_j = (1-a) w_y [j=y] + (a/C) w_j,  or  t_j = w_j ((1-a) T_j + a/C),
//   loss = -sum t_j log p_j,  g = p sum(t) - t,  |g| from the sum of g_j^2.
// The largest logit is kept out of every sum, so a confident row loses no digits.
#include "fastis.h"
#include "loss.h"

namespace fastis::FASTIS_ISA {

namespace {

template <class F>
struct Targets {
  using Int = typename Simd<F>::Int;
  const F* soft;           // [C] or null
  const F* class_weights;  // [C] or null
  Int label;
  F at_label, keep, spread;  // (1-a) w_y, 1-a, a/C

  Vec<F> operator()(int64_t c, int count) const {
    constexpr int V = kLanes<F>;
    const auto read = [&](const F* p) {
      return count == V ? load(p + c) : load_some(p + c, count, F(0));
    };
    const Vec<F> weight = class_weights != nullptr ? read(class_weights) : splat<F>(1);
    if (soft != nullptr) return weight * (read(soft) * keep + spread);
    const auto is_label = iota<F>() + static_cast<Int>(c) == label;
    return weight * spread + select<F>(is_label, splat<F>(at_label), Vec<F>{});
  }
};

template <class F>
struct Largest {
  F value;
  int64_t at;
};

template <class S, class F>
inline Vec<F> read_block(const S* z, int64_t c, int count, F fill) {
  return count == kLanes<F> ? load(z + c) : load_some(z + c, count, fill);
}

// The largest logit and its first class.
template <class S, class F = Compute<S>>
inline Largest<F> find_largest(const S* z, int64_t C) {
  using Int = typename Simd<F>::Int;
  constexpr int V = kLanes<F>;
  const F lowest = -F(__builtin_inf());
  Vec<F> best = splat<F>(lowest);
  Mask<F> at = iota<F>();
  for (int64_t c = 0; c < C; c += V) {
    const Vec<F> v = read_block(z, c, static_cast<int>(C - c < V ? C - c : V), lowest);
    const auto above = v > best;
    best = select<F>(above, v, best);
    at = above ? iota<F>() + static_cast<Int>(c) : at;
  }
  Largest<F> largest{best[0], at[0]};
  for (int i = 1; i < V; ++i) {
    if (best[i] > largest.value || (best[i] == largest.value && at[i] < largest.at)) {
      largest = {best[i], at[i]};
    }
  }
  return largest;
}

// Sums over the classes but the largest, at class a.
template <class F>
struct SoftSums {
  F s, t, cross;  // sum exp(z_j - m), sum t_j, sum t_j (m - z_j)
};

// Added up in blocks of classes: sums of millions of floats would lose their last digits.
constexpr int64_t kBlock = 4096;

// Over the classes [begin, end).
template <class S, class F = Compute<S>>
inline SoftSums<F> sum_block(const S* z, int64_t begin, int64_t end, int64_t C, Largest<F> top,
                             const Targets<F>& targets, F* e) {
  using Int = typename Simd<F>::Int;
  constexpr int V = kLanes<F>;
  Vec<F> s{}, t{}, cross{};
  for (int64_t c = begin; c < end; c += V) {
    const int count = static_cast<int>(C - c < V ? C - c : V);
    const Vec<F> x = read_block(z, c, count, top.value) - top.value;
    const auto classes = iota<F>() + static_cast<Int>(c);
    const auto counted = (classes != static_cast<Int>(top.at)) & (classes < static_cast<Int>(C));
    const Vec<F> zero{};
    const Vec<F> term = exp_term(x), share = targets(c, count);
    s += select<F>(counted, term, zero);
    t += select<F>(counted, share, zero);
    cross += select<F>(classes < static_cast<Int>(C), share * -x, zero);
    store(e + c, term);
  }
  return {reduce_add<F>(s), reduce_add<F>(t), reduce_add<F>(cross)};
}

template <class S, class F = Compute<S>>
inline SoftSums<F> soft_sums(const S* z, int64_t C, Largest<F> top, const Targets<F>& targets,
                             F* e) {
  double s = 0, t = 0, cross = 0;
  for (int64_t begin = 0; begin < C; begin += kBlock) {
    const int64_t end = C - begin < kBlock ? C : begin + kBlock;
    const SoftSums<F> block = sum_block(z, begin, end, C, top, targets, e);
    s += static_cast<double>(block.s);
    t += static_cast<double>(block.t);
    cross += static_cast<double>(block.cross);
  }
  // inf - inf: a maximum that is not finite leaves nothing but NaN, as in torch.
  return {static_cast<F>(s) + (top.value - top.value), static_cast<F>(t), static_cast<F>(cross)};
}

template <class G, class V>
inline void write_block(G* p, V x, int count) {
  if (count == static_cast<int>(sizeof(V) / sizeof(x[0]))) {
    store(p, x);
  } else {
    store_some(p, x, count);
  }
}

// Writes scale * g and returns |g|.
template <class G, class F>
inline F soft_gradient(const F* e, int64_t C, Largest<F> top, const SoftSums<F>& sums,
                       const Targets<F>& targets, F scale, G* grad, F* column_sum) {
  using Int = typename Simd<F>::Int;
  constexpr int V = kLanes<F>;
  const F top_share = targets(top.at, 1)[0];
  const F inverse = 1 / (1 + sums.s);
  const F p_scale = (sums.t + top_share) * inverse;
  // p_a sum(t) - t_a without the difference of two numbers near 1.
  const F at_top = (sums.t - top_share * sums.s) * inverse;
  typename Norm<F>::Blocks norm;
  for (int64_t begin = 0; begin < C; begin += kBlock) {
    const int64_t end = C - begin < kBlock ? C : begin + kBlock;
    Norm<F> block;
    for (int64_t c = begin; c < end; c += V) {
      const int count = static_cast<int>(C - c < V ? C - c : V);
      const auto classes = iota<F>() + static_cast<Int>(c);
      Vec<F> g = load(e + c) * p_scale - targets(c, count);
      g = select<F>(classes == static_cast<Int>(top.at), splat<F>(at_top), g);
      g = select<F>(classes < static_cast<Int>(C), g, Vec<F>{});
      block.add(g);
      g *= scale;
      if (grad != nullptr) write_block(grad + c, g, count);
      if (column_sum != nullptr) {
        write_block(column_sum + c, g + read_block(column_sum, c, count, F(0)), count);
      }
    }
    norm.add(block);
  }
  return norm.value();
}

template <class S, class F = Compute<S>>
inline Targets<F> targets_of(const Problem<S>& p, int64_t row) {
  if (p.soft != nullptr) {
    return {p.soft + row * p.C, p.class_weights, -1, 0, p.keep, p.spread};
  }
  const int64_t y = p.target[row];
  return {
      nullptr, p.class_weights, static_cast<typename Simd<F>::Int>(y), p.keep * p.class_weight(y),
      p.keep,  p.spread};
}

}  // namespace

template <class S>
void rows_of_soft_targets(const Problem<S>& p, const Chunk<Compute<S>>& chunk) {
  using F = Compute<S>;
  F* const e = chunk.scratch;  // [C] in whole vectors
  for (int64_t row = chunk.begin; row < chunk.end; ++row) {
    auto* grad = p.grad != nullptr ? p.grad + row * p.C : nullptr;
    if (p.ignored(row)) {
      zero_row(grad, p.C);
      p.row_loss[row] = p.row_norm[row] = 0;
      continue;
    }
    const S* z = p.logits + row * p.row_stride;
    const Targets<F> targets = targets_of(p, row);
    const Largest<F> top = find_largest(z, p.C);
    const SoftSums<F> sums = soft_sums(z, p.C, top, targets, e);
    const F total = sums.t + targets(top.at, 1)[0];
    p.row_loss[row] = sums.cross + total * log1p(splat<F>(sums.s), splat<F>(1 / (1 + sums.s)))[0];
    const F scale = p.coefficient(row) * p.inverse_denominator;
    p.row_norm[row] = soft_gradient(e, p.C, top, sums, targets, scale, grad, chunk.column_sum);
  }
}

template void rows_of_soft_targets(const Problem<float>&, const Chunk<float>&);
template void rows_of_soft_targets(const Problem<double>&, const Chunk<double>&);
template void rows_of_soft_targets(const Problem<BFloat16>&, const Chunk<float>&);
template void rows_of_soft_targets(const Problem<Float16>&, const Chunk<float>&);

}  // namespace fastis::FASTIS_ISA
