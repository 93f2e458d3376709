// What the cross-entropy kernels share: the problem, the row's closed form, chunks of rows.
// Rows are tokens: R = B T, row r belongs to sample r / T. Equations: Kutsuna 2025, section 7;
// Katharopoulos & Fleuret 2018, eq. 19, in the cancellation-free form of
// fastis/kernels/reference/loss.py.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include "simd_math.h"

namespace fastis::FASTIS_ISA {

template <class T, class Void>
T* as(Pointer<Void> pointer) {
  return static_cast<T*>(pointer.address);
}

template <class S>
struct Problem {
  using F = Compute<S>;
  const S* logits;  // [R, C], rows row_stride apart
  int64_t row_stride;
  const int64_t* target;   // [R], or null with soft
  const F* soft;           // [R, C] probabilities, or null
  const F* weights;        // [B] coefficients r_i, or null (1)
  const F* class_weights;  // [C], or null (1)
  int64_t T, R, C, ignore_index;
  bool any_ignored;
  F keep, spread;  // 1 - a, a / C of the smoothing a
  F inverse_denominator;
  Grad<S>* grad;  // [R, C] or null
  F* row_loss;    // [R] unweighted by weights
  F* row_norm;    // [R] |g|

  bool ignored(int64_t row) const { return any_ignored && target[row] == ignore_index; }
  F coefficient(int64_t row) const { return weights != nullptr ? weights[row / T] : F(1); }
  F class_weight(int64_t c) const { return class_weights != nullptr ? class_weights[c] : F(1); }
};

// One row (or a vector of rows) from its sums over j != y: m = max z_j, s = sum exp(z_j - m),
// q = sum exp(z_j - m)^2. The softmax is exp(z_j - m) * p_scale and g_y = -s * p_scale.
template <class V>
struct RowResult {
  V loss, norm, p_scale;
};

template <class F>
inline RowResult<Vec<F>> finish_rows(Vec<F> z_y, Vec<F> m, Vec<F> s, Vec<F> q) {
  const Vec<F> d = z_y - m;
  const auto leads = d >= F(0);
  const Vec<F> x = exp_full(select<F>(leads, -d, d));
  const Vec<F> a = select<F>(leads, x, splat<F>(1));
  const Vec<F> inverse = F(1) / fma<F>(s, a, select<F>(leads, splat<F>(1), x));
  const Vec<F> excess = select<F>(leads, s * x, (s - F(1)) + x);
  const Vec<F> p_scale = a * inverse;
  RowResult<Vec<F>> row{log1p(excess, inverse) + select<F>(leads, splat<F>(0), -d),
                        sqrt<F>(fma<F>(s, s, q)) * p_scale, p_scale};
  // +inf at the label would look like certainty; torch has NaN there.
  const auto invalid = z_y == F(__builtin_inf());
  const Vec<F> nan = splat<F>(F(__builtin_nan("")));
  row.loss = select<F>(invalid, nan, row.loss);
  row.norm = select<F>(invalid, nan, row.norm);
  row.p_scale = select<F>(invalid, nan, row.p_scale);
  return row;
}

// A maximum of -inf (no class but y is possible) must not make -inf - -inf: z_y stands in.
template <class F>
inline Vec<F> safe_max(Vec<F> m, Vec<F> z_y) {
  return select<F>(m == -F(__builtin_inf()), z_y, m);
}

// A sum of squares of numbers that may be as small as exp(-88), whose squares are 0 in float.
template <class F>
class Norm {
 public:
  void add(Vec<F> g) {
    large_ = fma<F>(g, g, large_);
    const Vec<F> raised = g * kRaise;
    small_ = fma<F>(raised, raised, small_);
  }
  F value() const { return root(reduce_add<F>(large_), reduce_add<F>(small_)); }

  // Of a row in blocks, in double: a float sum of millions of squares has lost its last digits.
  struct Blocks {
    double large = 0, small = 0;
    void add(const Norm& block) {
      large += static_cast<double>(reduce_add<F>(block.large_));
      small += static_cast<double>(reduce_add<F>(block.small_));
    }
    F value() const { return root(large, small); }
  };

 private:
  static constexpr F kRaise = F(0x1p80);
  static F root(double large, double small) {
    // Where `small` overflows, `large` is far from underflow.
    return static_cast<F>(large < 1e-30 ? __builtin_sqrt(small) / double(kRaise)
                                        : __builtin_sqrt(large));
  }
  Vec<F> large_{}, small_{};
};

// Rows [begin, end) of a kernel, and what it works with.
template <class F>
struct Chunk {
  int64_t begin, end;
  F* scratch;     // as many as for_chunks was asked for
  F* column_sum;  // [C], to which the columns of the scaled gradient are added, or null
};
template <class S>
void rows_of_few_classes(const Problem<S>& p, const Chunk<Compute<S>>& chunk);
template <class S>
void rows_of_many_classes(const Problem<S>& p, const Chunk<Compute<S>>& chunk);
template <class S>
void rows_of_soft_targets(const Problem<S>& p, const Chunk<Compute<S>>& chunk);

// Above this, lanes over classes are fuller than a transposed tile of rows is cheap.
constexpr int64_t kFewClasses = 64;
// Rows of many classes solved together: their closed forms share one vector, their column sums one
// pass.
constexpr int kGroup = 4;
// Above 16384 the exponentials of a group would leave the second-level cache.
constexpr int rows_together(int64_t C) { return C <= 16384 ? kGroup : 1; }

// C rounded up to whole vectors.
template <class F>
constexpr int64_t padded(int64_t C) {
  return (C + kLanes<F> - 1) / kLanes<F> * kLanes<F>;
}

template <class G>
inline void zero_row(G* grad, int64_t C) {
  if (grad != nullptr) std::memset(static_cast<void*>(grad), 0, sizeof(G) * C);
}

// At least 1. Depends on the shape alone, never on the threads: sums are added in the same order.
inline int64_t rows_per_chunk(int64_t rows, int64_t columns) {
  const auto round_up = [](int64_t x) { return (x + 15) / 16 * 16; };
  const int64_t at_most_64_chunks = round_up((rows + 63) / 64);
  const int64_t wide_rows = columns > 16384 ? 1 : 0;
  const int64_t at_least_16k_elements = round_up(16384 / (columns > 0 ? columns : 1) + wide_rows);
  return at_most_64_chunks > at_least_16k_elements ? at_most_64_chunks : at_least_16k_elements;
}

inline int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Runs kernel(Chunk) over all chunks, each with `scratch` elements of memory; mean_grad [columns]
// (or null) gets the column sums times `scale`.
template <class F, class Kernel>
void for_chunks(int64_t rows, int64_t columns, int64_t scratch, int threads, F* mean_grad,
                double scale, const Kernel& kernel) {
  const int64_t step = rows_per_chunk(rows, columns);
  const int64_t chunks = (rows + step - 1) / step;
  const bool summed = mean_grad != nullptr;
  threads = static_cast<int>(threads < chunks ? threads : chunks);
  const Scratch<F> partial(summed ? chunks * columns : 0);
  const Scratch<F> memory(scratch * threads);
  if (summed && chunks > 0) {
    std::memset(static_cast<void*>(partial), 0, sizeof(F) * chunks * columns);
  }
  const auto run = [&](int64_t chunk, int thread) {
    const int64_t begin = chunk * step;
    const int64_t end = begin + step < rows ? begin + step : rows;
    kernel(Chunk<F>{begin, end, memory + thread * scratch,
                    summed ? partial + chunk * columns : nullptr});
  };
  if (threads > 1) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) run(chunk, thread_number());
  } else {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) run(chunk, 0);
  }
  if (!summed) return;
  for (int64_t c = 0; c < columns; ++c) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * columns + c];
    mean_grad[c] = static_cast<F>(sum * scale);
  }
}

// losses, score [B] of the samples from their rows (tokens).
template <class F>
void sum_tokens(const F* row_loss, const F* row_norm, int64_t B, int64_t T, F* losses, F* score) {
  for (int64_t b = 0; b < B; ++b) {
    double sum = 0, squares = 0;
    for (int64_t t = b * T; t < (b + 1) * T; ++t) {
      sum += row_loss[t];
      squares += double(row_norm[t]) * row_norm[t];
    }
    losses[b] = static_cast<F>(sum);
    score[b] = static_cast<F>(__builtin_sqrt(squares));
  }
}

// loss: the weighted sum over the denominator when `reduce`, else [B]. Eight running sums hide the
// latency of the additions.
template <class F, class Call>
void reduce_losses(const Call& call, double denominator) {
  const int64_t B = call.B;
  const F* const losses = as<const F>(call.losses);
  const F* const weights = as<const F>(call.weights);
  F* const loss = as<F>(call.loss);
  if (!call.reduce) {
    for (int64_t b = 0; b < B; ++b)
      loss[b] = weights != nullptr ? weights[b] * losses[b] : losses[b];
    return;
  }
  double total[8] = {};
  int64_t b = 0;
  for (; b + 8 <= B; b += 8) {
    for (int i = 0; i < 8; ++i) {
      total[i] += weights != nullptr ? double(weights[b + i]) * losses[b + i] : losses[b + i];
    }
  }
  for (; b < B; ++b)
    total[b % 8] += weights != nullptr ? double(weights[b]) * losses[b] : losses[b];
  double sum = 0;
  for (const double part : total) sum += part;
  *loss = static_cast<F>(sum * (1 / denominator));
}

}  // namespace fastis::FASTIS_ISA
