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
void solve(const CrossEntropy& call, Problem<S>& p) {
  using F = Compute<S>;
  const double denominator =
      call.denominator != call.denominator ? batch_denominator(p) : call.denominator;
  // A denominator of 0 is applied at the end: before it, terms of 0 would become NaN.
  const double divisor = denominator == 0 ? 1 : denominator;
  p.inverse_denominator = static_cast<F>(1 / divisor);
  F* const losses = as<F>(call.losses);
  F* const score = as<F>(call.score);
  const Scratch<F> rows(p.T == 1 ? 0 : 2 * p.R);
  p.row_loss = p.T == 1 ? losses : rows;
  p.row_norm = p.T == 1 ? score : rows + p.R;
  const bool soft = p.soft != nullptr || p.spread != 0, few = !soft && p.C <= kFewClasses;
  const int64_t scratch = few ? 0 : padded<F>(p.C) * (soft ? 1 : rows_together(p.C));
  for_chunks<F>(p.R, p.C, scratch, call.threads, as<F>(call.mean_grad),
                divisor / static_cast<double>(call.B), [&](const Chunk<F>& chunk) {
                  if (soft) return rows_of_soft_targets(p, chunk);
                  if (few) return rows_of_few_classes(p, chunk);
                  rows_of_many_classes(p, chunk);
                });
  if (denominator == 0 && p.grad != nullptr) divide_by_zero(p.grad, p.R * p.C);
  if (p.T != 1) sum_tokens<F>(p.row_loss, p.row_norm, call.B, p.T, losses, score);
  reduce_losses<F>(call, denominator);
}

}  // namespace

int64_t cross_entropy(const CrossEntropy& call) {
  const int64_t rows = call.B * call.T;
  const Labels labels = call.target != nullptr
                            ? check_labels(call.target, rows, call.C, call.ignore_index)
                            : Labels{-1, false};
  if (labels.bad_row >= 0) return labels.bad_row;
  with_format(call.format, [&](auto format) {
    using S = decltype(format);
    using F = Compute<S>;
    Problem<S> p{as<const S>(call.logits), call.row_stride, call.target, as<const F>(call.soft),
                 as<const F>(call.weights), as<const F>(call.class_weights), call.T, rows, call.C,
                 call.ignore_index, labels.any_ignored,
                 // Rounded last: in float32, 1 - a would have lost the digits of an a near 1.
                 static_cast<F>(1 - call.smoothing),
                 static_cast<F>(call.smoothing / static_cast<double>(call.C)), F(1),
                 as<Grad<S>>(call.grad), nullptr, nullptr};
    solve(call, p);
  });
  return -1;
}

}  // namespace fastis::FASTIS_ISA
