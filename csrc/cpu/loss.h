// What the cross-entropy kernels share: the problem, the row's closed form, chunks of rows.
// Rows are tokens: R = B T, row r belongs to sample r / T. Equations: Kutsuna 2025, section 7;
// Katharopoulos & Fleuret 2018, eq. 19, in the cancellation-free form of reference_loss.py.
#pragma once

#include "simd_math.h"

namespace fastis::FASTIS_ISA {

template <class S>
struct Problem {
  using F = Compute<S>;
  using G = typename Format<S>::Grad;
  const S* logits;  // [R, C], rows row_stride apart
  int64_t row_stride;
  const int64_t* target;   // [R], or null with soft
  const F* soft;           // [R, C] probabilities, or null
  const F* weights;        // [B] coefficients r_i, or null (1)
  const F* class_weights;  // [C], or null (1)
  int64_t T, R, C, ignore_index;
  bool any_ignored;
  F smoothing, inverse_denominator;
  G* grad;      // [R, C] or null
  F* row_loss;  // [R] unweighted by weights
  F* row_norm;  // [R] |g|

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

 private:
  static constexpr F kRaise = F(0x1p80);
  static F root(F large, F small) {
    // Where `small` overflows, `large` is far from underflow.
    return large < F(1e-30) ? sqrt<F>(splat<F>(small))[0] / kRaise : sqrt<F>(splat<F>(large))[0];
  }
  Vec<F> large_{}, small_{};
};

// Each kernel does rows [begin, end) and adds the columns of the scaled gradient to
// column_sum [C] unless that is null.
template <class S>
void rows_of_few_classes(const Problem<S>& p, int64_t begin, int64_t end, Compute<S>* column_sum);
template <class S>
void rows_of_many_classes(const Problem<S>& p, int64_t begin, int64_t end, Compute<S>* column_sum);
template <class S>
void rows_of_soft_targets(const Problem<S>& p, int64_t begin, int64_t end, Compute<S>* column_sum);

// Above this, lanes over classes are fuller than a transposed tile of rows is cheap.
constexpr int64_t kFewClasses = 64;

template <class G>
inline void zero_row(G* grad, int64_t C) {
  if (grad != nullptr) std::memset(static_cast<void*>(grad), 0, sizeof(G) * C);
}

// Rows per chunk depend on the shape alone, never on the threads: sums are added in the same order.
inline int64_t rows_per_chunk(int64_t rows, int64_t columns) {
  const auto round_up = [](int64_t x) { return (x + 15) / 16 * 16; };
  const int64_t at_most_64_chunks = round_up((rows + 63) / 64);
  const int64_t at_least_16k_elements = round_up(16384 / (columns > 0 ? columns : 1));
  return at_most_64_chunks > at_least_16k_elements ? at_most_64_chunks : at_least_16k_elements;
}

// Runs kernel(begin, end, column_sum) over all chunks; mean_grad [columns] (or null) gets the
// column sums times `scale`.
template <class F, class Kernel>
void for_chunks(int64_t rows, int64_t columns, int threads, F* mean_grad, double scale,
                const Kernel& kernel) {
  const int64_t step = rows_per_chunk(rows, columns);
  const int64_t chunks = (rows + step - 1) / step;
  const bool summed = mean_grad != nullptr;
  const Scratch<F> partial(summed ? chunks * columns : 0);
  if (summed) std::memset(static_cast<void*>(partial), 0, sizeof(F) * chunks * columns);
  const auto run = [&](int64_t chunk) {
    const int64_t begin = chunk * step;
    const int64_t end = begin + step < rows ? begin + step : rows;
    kernel(begin, end, summed ? partial + chunk * columns : nullptr);
  };
  if (threads > 1 && chunks > 1) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) run(chunk);
  } else {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) run(chunk);
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
template <class F>
void reduce_losses(const F* losses, const F* weights, int64_t B, double inverse_denominator,
                   bool reduce, F* loss) {
  if (!reduce) {
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
  *loss = static_cast<F>(sum * inverse_denominator);
}

}  // namespace fastis::FASTIS_ISA
