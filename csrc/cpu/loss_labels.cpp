// Losses that are sums over independent labels: binary cross-entropy with logits and squared error.
// Lanes run over the flat [rows x labels] of a block, full whatever L is; then rows are summed.
//   bce: loss (1-y) softplus(z) + w y softplus(-z),  g = (1-y) sigmoid(z) - w y sigmoid(-z)
//   mse: loss (z-y)^2,  g = 2 (z-y)
#include "fastis.h"
#include "loss.h"

namespace fastis::FASTIS_ISA {

namespace {

template <class F>
struct Term {
  Vec<F> loss, grad;
};

template <class F>
inline Term<F> binary_cross_entropy(Vec<F> z, Vec<F> y, Vec<F> pos_weight) {
  const auto positive = z >= F(0);
  const Vec<F> zero{};
  const Vec<F> x = exp_full(select<F>(positive, -z, z));
  const Vec<F> inverse = F(1) / (F(1) + x), tail = log1p(x, inverse);
  const Vec<F> large = inverse, small = x * inverse;
  const Vec<F> off = F(1) - y, on = pos_weight * y;
  const Vec<F> up = select<F>(positive, z, zero) + tail;
  const Vec<F> down = select<F>(positive, zero, -z) + tail;
  return {off * up + on * down,
          off * select<F>(positive, large, small) - on * select<F>(positive, small, large)};
}

template <class F>
inline Term<F> squared_error(Vec<F> z, Vec<F> y, Vec<F>) {
  const Vec<F> d = z - y;
  return {d * d, F(2) * d};
}

enum class Kind { binary_cross_entropy, squared_error };

template <class S>
struct Labels {
  using F = Compute<S>;
  const S* logits;      // [B, L]
  const F* target;      // [B, L]
  const F* weights;     // [B] or null
  const F* pos_weight;  // [L] or null
  int64_t L;
  F inverse_divisor, inverse_denominator;
  typename Format<S>::Grad* grad;  // [B, L] or null
  F *losses, *score;               // [B]
};

template <class F>
struct Block {
  F* loss;  // [elements] of a block of rows
  F* grad;
  const F* pos_weight;  // repeated for the rows of a block
};

template <Kind kind, class S, class F = Compute<S>>
inline void elements(const Labels<S>& p, int64_t offset, int64_t count, const Block<F>& block) {
  constexpr int V = kLanes<F>;
  for (int64_t i = 0; i < count; i += V) {
    const int some = static_cast<int>(count - i < V ? count - i : V);
    const S* z_at = p.logits + offset + i;
    const F* y_at = p.target + offset + i;
    const Vec<F> z = some == V ? load(z_at) : load_some(z_at, some, F(0));
    const Vec<F> y = some == V ? load(y_at) : load_some(y_at, some, F(0));
    const Vec<F> w = block.pos_weight != nullptr ? load(block.pos_weight + i) : splat<F>(1);
    const Term<F> term =
        kind == Kind::squared_error ? squared_error<F>(z, y, w) : binary_cross_entropy<F>(z, y, w);
    store(block.loss + i, term.loss);
    store(block.grad + i, term.grad);
  }
}

// Sums one row of the block and scales its gradient; block.grad is padded to whole vectors.
template <class S, class F = Compute<S>>
inline void finish_row(const Labels<S>& p, int64_t row, const F* loss, F* grad, F* column_sum) {
  constexpr int V = kLanes<F>;
  Vec<F> total{};
  Norm<F> norm;
  int64_t i = 0;
  for (; i + V <= p.L; i += V) {
    total += load(loss + i);
    norm.add(load(grad + i));
  }
  if (i < p.L) {
    const int rest = static_cast<int>(p.L - i);
    total += load_some(loss + i, rest, F(0));
    norm.add(load_some(grad + i, rest, F(0)));
  }
  const F sum = reduce_add<F>(total);
  p.losses[row] = sum * p.inverse_divisor;
  p.score[row] = norm.value() * p.inverse_divisor;
  const F r = p.weights != nullptr ? p.weights[row] : F(1);
  const F scale = r * p.inverse_divisor * p.inverse_denominator;
  for (i = 0; i < p.L; ++i) grad[i] *= scale;
  if (column_sum == nullptr) return;
  for (i = 0; i < p.L; ++i) column_sum[i] += grad[i];
}

template <Kind kind, class S, class F = Compute<S>>
void label_rows(const Labels<S>& p, int64_t begin, int64_t end, F* column_sum) {
  constexpr int V = kLanes<F>;
  if (p.L == 0) {
    for (int64_t row = begin; row < end; ++row)
      p.losses[row] = p.score[row] = 0 * p.inverse_divisor;
    return;
  }
  const int64_t rows = p.L < 1024 ? 1024 / p.L : 1, size = rows * p.L + V;
  const Scratch<F> loss(size), grad(size), repeated(p.pos_weight != nullptr ? size : 0);
  if (p.pos_weight != nullptr) {
    for (int64_t i = 0; i < size; ++i) repeated[i] = p.pos_weight[i % p.L];
  }
  const Block<F> block{loss, grad, p.pos_weight != nullptr ? static_cast<F*>(repeated) : nullptr};
  for (int64_t row = begin; row < end; row += rows) {
    const int64_t here = end - row < rows ? end - row : rows, count = here * p.L;
    elements<kind>(p, row * p.L, count, block);
    for (int64_t r = 0; r < here; ++r) {
      finish_row(p, row + r, block.loss + r * p.L, block.grad + r * p.L, column_sum);
    }
    if (p.grad == nullptr) continue;
    auto* out = p.grad + row * p.L;
    int64_t i = 0;
    for (; i + V <= count; i += V) store(out + i, load(block.grad + i));
    if (i < count) store_some(out + i, load(block.grad + i), static_cast<int>(count - i));
  }
}

template <class S>
void labels_as(Kind kind, const void* logits, const void* target, const void* weights,
               const void* pos_weight, int64_t B, int64_t L, double divisor, double denominator,
               bool reduce, void* grad, void* loss, void* losses, void* score, void* mean_grad,
               int threads) {
  using F = Compute<S>;
  const Labels<S> p{static_cast<const S*>(logits),
                    static_cast<const F*>(target),
                    static_cast<const F*>(weights),
                    static_cast<const F*>(pos_weight),
                    L,
                    static_cast<F>(1 / divisor),
                    static_cast<F>(1 / denominator),
                    static_cast<typename Format<S>::Grad*>(grad),
                    static_cast<F*>(losses),
                    static_cast<F*>(score)};
  for_chunks<F>(B, L, threads, static_cast<F*>(mean_grad), denominator / static_cast<double>(B),
                [&](int64_t begin, int64_t end, F* column_sum) {
                  if (kind == Kind::squared_error) {
                    label_rows<Kind::squared_error>(p, begin, end, column_sum);
                  } else {
                    label_rows<Kind::binary_cross_entropy>(p, begin, end, column_sum);
                  }
                });
  reduce_losses<F>(p.losses, p.weights, B, 1 / denominator, reduce, static_cast<F*>(loss));
}

}  // namespace

void label_loss(int kind, int format, Pointer<const void> logits, Pointer<const void> target,
                Pointer<const void> weights, Pointer<const void> pos_weight, int64_t B, int64_t L,
                double divisor, double denominator, bool reduce, Pointer<void> grad,
                Pointer<void> loss, Pointer<void> losses, Pointer<void> score,
                Pointer<void> mean_grad, int threads) {
  const auto run = format == 0   ? labels_as<float>
                   : format == 1 ? labels_as<double>
                   : format == 2 ? labels_as<BFloat16>
                                 : labels_as<Float16>;
  run(kind == 0 ? Kind::binary_cross_entropy : Kind::squared_error, logits, target, weights,
      pos_weight, B, L, divisor, denominator, reduce, grad, loss, losses, score, mean_grad,
      threads);
}

}  // namespace fastis::FASTIS_ISA
