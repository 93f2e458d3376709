// Losses that are sums over the outputs of a sample: binary cross-entropy with logits, squared
// error. Lanes run over the flat [rows x outputs] of a block, full whatever L is; then rows are
// summed.
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

using Kind = ElementwiseLoss::Kind;

template <class S>
struct Elementwise {
  using F = Compute<S>;
  const S* logits;      // [B, L]
  const F* target;      // [B, L]
  const F* weights;     // [B] or null
  const F* pos_weight;  // [L] or null
  int64_t L;
  F inverse_divisor, inverse_denominator;
  Grad<S>* grad;      // [B, L] or null
  F *losses, *score;  // [B]
};

// Elements that are solved together: whole rows, or a piece of one that has more.
constexpr int64_t kBlock = 1024;

template <class F>
struct alignas(64) Block {
  F loss[kBlock + kLanes<F>], grad[kBlock + kLanes<F>];
  F pos_weight[kBlock + kLanes<F>];  // repeated for the rows of a block
};

// The terms of `count` elements from `offset` on; `pos_weight` [count] may be null.
template <Kind kind, class S, class F = Compute<S>>
inline void elements(const Elementwise<S>& p, int64_t offset, int64_t count, const F* pos_weight,
                     Block<F>& block) {
  constexpr int V = kLanes<F>;
  for (int64_t i = 0; i < count; i += V) {
    const int some = static_cast<int>(count - i < V ? count - i : V);
    const auto read = [&](const auto* from) {
      return some == V ? load(from + i) : load_some(from + i, some, F(0));
    };
    const Vec<F> z = read(p.logits + offset), y = read(p.target + offset);
    const Vec<F> w = pos_weight != nullptr ? read(pos_weight) : splat<F>(1);
    const Term<F> term =
        kind == Kind::squared_error ? squared_error<F>(z, y, w) : binary_cross_entropy<F>(z, y, w);
    store(block.loss + i, term.loss);
    store(block.grad + i, term.grad);
  }
}

// The sum of the losses; the gradients go into `norm`.
template <class F>
inline F sum_terms(const F* loss, const F* grad, int64_t count, Norm<F>& norm) {
  constexpr int V = kLanes<F>;
  Vec<F> total{};
  int64_t i = 0;
  for (; i + V <= count; i += V) {
    total += load(loss + i);
    norm.add(load(grad + i));
  }
  if (i < count) {
    const int rest = static_cast<int>(count - i);
    total += load_some(loss + i, rest, F(0));
    norm.add(load_some(grad + i, rest, F(0)));
  }
  return reduce_add<F>(total);
}

template <class S, class F = Compute<S>>
inline void scale_terms(const Elementwise<S>& p, int64_t row, int64_t count, F* grad,
                        F* column_sum) {
  const F r = p.weights != nullptr ? p.weights[row] : F(1);
  const F scale = r * p.inverse_divisor * p.inverse_denominator;
  for (int64_t i = 0; i < count; ++i) grad[i] *= scale;
  if (column_sum == nullptr) return;
  for (int64_t i = 0; i < count; ++i) column_sum[i] += grad[i];
}

template <class S, class F = Compute<S>>
inline void write_grad(const Elementwise<S>& p, int64_t offset, int64_t count, const F* grad) {
  constexpr int V = kLanes<F>;
  if (p.grad == nullptr) return;
  auto* out = p.grad + offset;
  int64_t i = 0;
  for (; i + V <= count; i += V) store(out + i, load(grad + i));
  if (i < count) store_some(out + i, load(grad + i), static_cast<int>(count - i));
}

template <Kind kind, class S, class F = Compute<S>>
void narrow_rows(const Elementwise<S>& p, const Chunk<F>& chunk, Block<F>& block) {
  const int64_t rows = kBlock / p.L;
  const F* pos_weight = nullptr;
  if (p.pos_weight != nullptr) {
    for (int64_t i = 0; i < rows * p.L; ++i) block.pos_weight[i] = p.pos_weight[i % p.L];
    pos_weight = block.pos_weight;
  }
  for (int64_t row = chunk.begin; row < chunk.end; row += rows) {
    const int64_t here = chunk.end - row < rows ? chunk.end - row : rows, count = here * p.L;
    elements<kind>(p, row * p.L, count, pos_weight, block);
    for (int64_t r = 0; r < here; ++r) {
      F* const grad = block.grad + r * p.L;
      Norm<F> norm;
      const F sum = sum_terms<F>(block.loss + r * p.L, grad, p.L, norm);
      p.losses[row + r] = sum * p.inverse_divisor;
      p.score[row + r] = norm.value() * p.inverse_divisor;
      scale_terms(p, row + r, p.L, grad, chunk.column_sum);
    }
    write_grad<S>(p, row * p.L, count, block.grad);
  }
}

template <Kind kind, class S, class F = Compute<S>>
void wide_row(const Elementwise<S>& p, int64_t row, F* column_sum, Block<F>& block) {
  double sum = 0;
  typename Norm<F>::Blocks norm;
  for (int64_t at = 0; at < p.L; at += kBlock) {
    const int64_t count = p.L - at < kBlock ? p.L - at : kBlock, offset = row * p.L + at;
    const F* pos_weight = p.pos_weight != nullptr ? p.pos_weight + at : nullptr;
    elements<kind>(p, offset, count, pos_weight, block);
    Norm<F> of_block;
    sum += static_cast<double>(sum_terms<F>(block.loss, block.grad, count, of_block));
    norm.add(of_block);
    scale_terms(p, row, count, block.grad, column_sum != nullptr ? column_sum + at : nullptr);
    write_grad<S>(p, offset, count, block.grad);
  }
  p.losses[row] = static_cast<F>(sum) * p.inverse_divisor;
  p.score[row] = norm.value() * p.inverse_divisor;
}

template <Kind kind, class S, class F = Compute<S>>
void rows_of_elements(const Elementwise<S>& p, const Chunk<F>& chunk) {
  Block<F> block;
  if (p.L == 0) {
    for (int64_t row = chunk.begin; row < chunk.end; ++row)
      p.losses[row] = p.score[row] = 0 * p.inverse_divisor;
  } else if (p.L <= kBlock) {
    narrow_rows<kind>(p, chunk, block);
  } else {
    for (int64_t row = chunk.begin; row < chunk.end; ++row)
      wide_row<kind>(p, row, chunk.column_sum, block);
  }
}

template <class S>
void solve(const ElementwiseLoss& call) {
  using F = Compute<S>;
  const Elementwise<S> p{as<const S>(call.logits),
                         as<const F>(call.target),
                         as<const F>(call.weights),
                         as<const F>(call.pos_weight),
                         call.L,
                         static_cast<F>(1 / call.divisor),
                         static_cast<F>(1 / call.denominator),
                         as<Grad<S>>(call.grad),
                         as<F>(call.losses),
                         as<F>(call.score)};
  const double unscale = call.denominator / static_cast<double>(call.B);
  for_chunks<F>(call.B, call.L, 0, call.threads, as<F>(call.mean_grad), unscale,
                [&](const Chunk<F>& chunk) {
                  if (call.kind == Kind::squared_error) {
                    rows_of_elements<Kind::squared_error>(p, chunk);
                  } else {
                    rows_of_elements<Kind::binary_cross_entropy>(p, chunk);
                  }
                });
  reduce_losses<F>(call, call.denominator);
}

}  // namespace

void elementwise_loss(const ElementwiseLoss& call) {
  with_format(call.format, [&](auto format) { solve<decltype(format)>(call); });
}

}  // namespace fastis::FASTIS_ISA
