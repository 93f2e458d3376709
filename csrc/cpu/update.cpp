// The update: scores of a minibatch into the state table, the sampling structure and the variance
// traces. One pass of gathers, one of arithmetic (vectorised by the compiler), one of scatters,
// block by block. A sample that was drawn twice is updated once: its first position sets `last` to
// the present iteration, so that the second finds dt = 0.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/structure.h"
#include "fastis.h"

namespace fastis::FASTIS_ISA {
namespace {

constexpr int kBlock = 256;
constexpr int64_t kPrefetch = 24;

// A block of observations after the gather: one lane each, duplicates and non-finite ones left out.
struct Block {
  int size = 0;
  int64_t index[kBlock];
  float mean[kBlock], var[kBlock], x[kBlock], dt[kBlock];
  bool fresh[kBlock];
  uint32_t code[kBlock];
};

// The record, and the lowest level of the structure above it.
void prefetch(const Table& t, int64_t index) {
  __builtin_prefetch(t.records + index, 1);
  if (!t.scalars->valid) return;
  const int64_t node = index / kRadix, group = node / kRadix * kRadix;
  __builtin_prefetch(t.sums + group, 1);
  __builtin_prefetch(t.sums + group + kRadix / 2, 1);
  __builtin_prefetch(t.peaks + group, 1);
}

void gather(const Table& t, const int64_t* indices, const float* observed, int64_t n, int32_t now,
            Block& block) {
  block.size = 0;
  for (int64_t b = 0; b < std::min(n, kPrefetch); ++b) prefetch(t, indices[b]);
  for (int64_t b = 0; b < n; ++b) {
    if (b + kPrefetch < n) prefetch(t, indices[b + kPrefetch]);
    if (!usable(observed[b])) {
      ++t.scalars->skipped;
      continue;
    }
    Record& record = t.records[indices[b]];
    if (record.last >= now) continue;
    const int at = block.size++;
    const bool fresh = record.last < 0;
    block.index[at] = indices[b];
    block.mean[at] = fresh ? observed[b] : record.mean;  // d = 0: the mean is x and the variance 0
    block.var[at] = fresh ? 0.0f : record.var;
    block.x[at] = observed[b];
    block.fresh[at] = fresh;
    block.dt[at] = fresh ? 1.0f : static_cast<float>(now - record.last);
    record.last = now;
  }
}

void compute(Block& block, float tau, float floor, Importance kind) {
  for (int at = 0; at < block.size; ++at) {
    observe(block.mean[at], block.var[at], block.x[at], block.dt[at], tau);
  }
  for (int at = 0; at < block.size; ++at) {
    block.code[at] = code_of(importance_of(block.mean[at], block.var[at], kind), floor);
  }
}

void replace_in_structure(const Table& t, int64_t index, uint32_t old_code, uint64_t old_weight,
                          uint64_t new_weight, bool fresh) {
  if (old_code & kHeavyFlag) {
    const int64_t* at = std::lower_bound(t.heavy, t.heavy + t.scalars->num_heavy, index);
    t.heavy_weights[at - t.heavy] = new_weight;
    return;
  }
  add_to_sums(t, index, new_weight - old_weight);
  t.scalars->light += static_cast<int64_t>(new_weight - old_weight);
  refresh_peaks(t, index, old_code, t.records[index].code);
  if (fresh) count_seen(t, index);
}

// Writes a block back. Clears in_range when a new weight lies outside the range of e0: sums are
// then left alone, because the table will be rescaled from its state.
void scatter(const Table& t, const Block& block, int shift_limit, bool& in_range) {
  Scalars& s = *t.scalars;
  const int e0 = static_cast<int>(s.exponent);
  for (int at = 0; at < block.size; ++at) {
    Record& record = t.records[block.index[at]];
    const uint32_t old_code = record.code, code = block.code[at];
    record.mean = block.mean[at];
    record.var = block.var[at];
    record.code = code | (old_code & kHeavyFlag);
    const int shift = exponent_of(code) - e0;
    in_range = in_range && shift >= 0 && shift <= shift_limit;
    if (!in_range) continue;
    const uint64_t old_weight = weight_of(old_code & ~kHeavyFlag, e0);
    const uint64_t new_weight = weight_of(code, e0);
    s.total += static_cast<int64_t>(new_weight - old_weight);
    s.seen += block.fresh[at];
    if (s.valid) {
      replace_in_structure(t, block.index[at], old_code, old_weight, new_weight, block.fresh[at]);
    }
  }
}

void update_state(const Table& t, const int64_t* indices, const float* observed, int64_t n) {
  Scalars& s = *t.scalars;
  const int64_t last_iteration = std::numeric_limits<int32_t>::max();
  const int32_t now = static_cast<int32_t>(std::min(s.updates, last_iteration));
  const float tau = t.tau > 0 ? t.tau : static_cast<float>(std::max(now, 1));
  const float floor =
      floor_of(static_cast<uint64_t>(s.total), s.seen, static_cast<int>(s.exponent), t.floor);
  const int shift_limit = max_shift(n);
  bool in_range = true;
  Block block;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    gather(t, indices + begin, observed + begin, std::min<int64_t>(kBlock, n - begin), now, block);
    compute(block, tau, floor, t.importance);
    scatter(t, block, shift_limit, in_range);
  }
  if (!in_range || s.total > t.total_limit) rescale(t);
}

void derive(const Table& t, double n) {
  Variance& v = *t.variance;
  const double A = v.second / v.weight, U = v.uniform / v.weight;
  const double O2 = v.first_squared / v.weight, G2 = v.mean_squared / v.weight;
  const double bessel = n / (n - 1);
  const double mu2 = t.unbiased ? (n * G2 - A) / (n - 1) : G2;
  v.trace_is = t.unbiased ? bessel * (A - G2) : A - G2;
  v.trace_uniform = U - mu2;
  v.trace_optimal = t.unbiased ? bessel * (O2 - G2) : O2 - G2;
  v.effective_batch_size = n * v.trace_uniform / v.trace_is;
  const double o2 = t.unbiased ? (n * O2 - A) / (n - 1) : O2;
  const double gap = U - o2;
  v.efficiency = gap > 0 ? (A - o2) / gap : std::numeric_limits<double>::quiet_NaN();
  const double factor = v.effective_batch_size / n;
  const bool adjust = t.scalars->updates >= t.warmup_draws && std::isfinite(factor) && factor > 0;
  v.factor = adjust ? factor : 1.0;
}

// Kutsuna 2025, Proposition 4.1, from one minibatch; smoothed before any ratio is formed.
void update_variance(const Table& t, const float* weights, const float* score, int64_t n,
                     const float* mean_grad, int64_t num_classes) {
  Variance& v = *t.variance;
  constexpr int kLanes = 8;
  double a[kLanes] = {}, u[kLanes] = {}, o[kLanes] = {}, A = 0, U = 0, O = 0, G2 = 0;
  for (int64_t b = 0; b + kLanes <= n; b += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const double r = weights[b + j], x = score[b + j], rx = r * x;
      a[j] += rx * rx;
      u[j] += rx * x;
      o[j] += rx;
    }
  }
  for (int64_t b = n - n % kLanes; b < n; ++b) {
    const double r = weights[b], x = score[b], rx = r * x;
    A += rx * rx;
    U += rx * x;
    O += rx;
  }
  for (int j = 0; j < kLanes; ++j) {
    A += a[j];
    U += u[j];
    O += o[j];
  }
  for (int64_t c = 0; c < num_classes; ++c) G2 += double(mean_grad[c]) * double(mean_grad[c]);
  A /= n;
  U /= n;
  O /= n;
  if (!std::isfinite(A + U + O * O + G2)) return;
  if (t.scalars->updates == t.warmup_draws) v = Variance{};  // another distribution from here on
  const double keep = t.smoothing, add = 1 - keep;
  v.weight = keep * v.weight + add;
  v.second = keep * v.second + add * A;
  v.uniform = keep * v.uniform + add * U;
  v.first_squared = keep * v.first_squared + add * O * O;
  v.mean_squared = keep * v.mean_squared + add * G2;
  derive(t, static_cast<double>(n));
}

bool in_range(const int64_t* indices, int64_t n, int64_t num_samples) {
  bool good = true;
  for (int64_t b = 0; b < n; ++b) {
    good &= static_cast<uint64_t>(indices[b]) < static_cast<uint64_t>(num_samples);
  }
  return good;
}

}  // namespace

bool update(Pointer<const Table> table, Pointer<const int64_t> indices,
            Pointer<const float> observed, Pointer<const float> weights, Pointer<const float> score,
            int64_t n, Pointer<const float> mean_grad, int64_t num_classes) {
  const Table& t = *table.address;
  if (!in_range(indices, n, t.num_samples)) return false;
  if (n == 0) return true;
  if (t.records != nullptr) update_state(t, indices, observed, n);
  update_variance(t, weights, score, n, mean_grad, num_classes);
  ++t.scalars->updates;
  return true;
}

}  // namespace fastis::FASTIS_ISA
