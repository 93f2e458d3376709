// The cross-entropy entry point: checks the labels, resolves torch's denominator, picks the kernel.
#include "fastis.h"
#include "loss.h"

namespace fastis::FASTIS_ISA {

namespace {

struct Labels {
  int64_t bad_row;  // first with a label that is neither ignored nor a class, or -1
  bool any_ignored;
};

Labels check_labels(const int64_t* target, int64_t rows, int64_t C, int64_t ignore_index) {
  uint64_t outside = 0, bad = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const uint64_t is_outside = uint64_t(target[r]) >= uint64_t(C);
    const uint64_t is_ignored = target[r] == ignore_index;
    outside |= is_outside | is_ignored;
    bad |= is_outside & (is_ignored ^ 1);
  }
  if (bad == 0) return {-1, outside != 0};
  int64_t r = 0;
  while (target[r] == ignore_index || uint64_t(target[r]) < uint64_t(C)) ++r;
  return {r, true};
}

// torch's: the class weights of the rows that are not ignored; all rows with probabilities.
template <class S>
double batch_denominator(const Problem<S>& p) {
  if (p.target == nullptr || (!p.any_ignored && p.class_weights == nullptr)) {
    return static_cast<double>(p.R);
  }
  double sum = 0;
  for (int64_t r = 0; r < p.R; ++r) {
    if (!p.ignored(r)) sum += p.class_weight(p.target[r]);
  }
  return sum;
}

// Terms of 0 stay.
template <class G>
void divide_by_zero(G* grad, int64_t count) {
  for (int64_t i = 0; i < count; ++i) grad[i] = grad[i] == 0 ? 0 : grad[i] / G(0);
}
void divide_by_zero(BFloat16* grad, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t magnitude = grad[i].bits & 0x7fffu;
    if (magnitude > 0 && magnitude < 0x7f80u) grad[i].bits = (grad[i].bits & 0x8000u) | 0x7f80u;
  }
}

template <class S>
struct Outputs {
  using F = Compute<S>;
  F *loss, *losses, *score, *mean_grad;
};

template <class S>
void solve(Problem<S>& p, const Outputs<S>& out, int64_t B, double denominator, bool reduce,
           int threads) {
  using F = Compute<S>;
  if (denominator != denominator) denominator = batch_denominator(p);
  // A denominator of 0 is applied at the end: before it, terms of 0 would become NaN.
  const double divisor = denominator == 0 ? 1 : denominator;
  p.inverse_denominator = static_cast<F>(1 / divisor);
  const Scratch<F> rows(p.T == 1 ? 0 : 2 * p.R);
  p.row_loss = p.T == 1 ? out.losses : rows;
  p.row_norm = p.T == 1 ? out.score : rows + p.R;
  const bool soft = p.soft != nullptr || p.spread != 0, few = !soft && p.C <= kFewClasses;
  const int64_t scratch = few ? 0 : padded<F>(p.C) * (soft ? 1 : rows_together(p.C));
  for_chunks<F>(p.R, p.C, scratch, threads, out.mean_grad, divisor / static_cast<double>(B),
                [&](const Chunk<F>& chunk) {
                  if (soft) return rows_of_soft_targets(p, chunk);
                  if (few) return rows_of_few_classes(p, chunk);
                  rows_of_many_classes(p, chunk);
                });
  if (denominator == 0 && p.grad != nullptr) divide_by_zero(p.grad, p.R * p.C);
  if (p.T != 1) sum_tokens<F>(p.row_loss, p.row_norm, B, p.T, out.losses, out.score);
  reduce_losses<F>(out.losses, p.weights, B, 1 / denominator, reduce, out.loss);
}

}  // namespace

template <class S>
int64_t cross_entropy_as(const void* logits, int64_t row_stride, const int64_t* target,
                         const void* soft, const void* weights, const void* class_weights,
                         int64_t B, int64_t T, int64_t C, int64_t ignore_index, double smoothing,
                         double denominator, bool reduce, void* grad, void* loss, void* losses,
                         void* score, void* mean_grad, int threads) {
  using F = Compute<S>;
  using G = typename Format<S>::Grad;
  const Labels labels =
      target != nullptr ? check_labels(target, B * T, C, ignore_index) : Labels{-1, false};
  if (labels.bad_row >= 0) return labels.bad_row;
  Problem<S> p{static_cast<const S*>(logits), row_stride, target, static_cast<const F*>(soft),
               static_cast<const F*>(weights), static_cast<const F*>(class_weights), T, B * T, C,
               ignore_index, labels.any_ignored,
               // Rounded last: in float32, 1 - a would have lost the digits of an a near 1.
               static_cast<F>(1 - smoothing), static_cast<F>(smoothing / static_cast<double>(C)),
               F(1), static_cast<G*>(grad), nullptr, nullptr};
  const Outputs<S> out{static_cast<F*>(loss), static_cast<F*>(losses), static_cast<F*>(score),
                       static_cast<F*>(mean_grad)};
  solve(p, out, B, denominator, reduce, threads);
  return -1;
}

int64_t cross_entropy(int format, Pointer<const void> logits, int64_t row_stride,
                      Pointer<const int64_t> target, Pointer<const void> soft,
                      Pointer<const void> weights, Pointer<const void> class_weights, int64_t B,
                      int64_t T, int64_t C, int64_t ignore_index, double smoothing,
                      double denominator, bool reduce, Pointer<void> grad, Pointer<void> loss,
                      Pointer<void> losses, Pointer<void> score, Pointer<void> mean_grad,
                      int threads) {
  const auto run = format == 0   ? cross_entropy_as<float>
                   : format == 1 ? cross_entropy_as<double>
                   : format == 2 ? cross_entropy_as<BFloat16>
                                 : cross_entropy_as<Float16>;
  return run(logits, row_stride, target, soft, weights, class_weights, B, T, C, ignore_index,
             smoothing, denominator, reduce, grad, loss, losses, score, mean_grad, threads);
}

}  // namespace fastis::FASTIS_ISA
