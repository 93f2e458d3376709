// A sampler's memory as the kernels see it: addresses of tensors that Python owns, and constants.
#pragma once

#include <cstdint>

#include "code.h"

namespace fastis {

// One int64 each, on the sampler's device; fastis/kernels/layout.py names the same positions.
struct Scalars {
  int64_t draws;         // minibatches issued: the clock of the randomness and of the warm-up
  int64_t updates;       // minibatches observed: the clock of the moving averages
  int64_t skipped;       // non-finite scores left out
  int64_t exponent;      // e0 of code.h; kNoExponent while nothing has been seen
  int64_t total;         // sum of the integer weights of the seen samples
  int64_t seen;          // how many those are
  int64_t valid;         // does the sampling structure below match the codes?
  int64_t light;         // sum of the structure: the total less the capped items
  int64_t num_capped;    // items above theta, kept outside the structure
  int64_t theta;         // the weight that capped items are drawn with (2^62: no cap)
  int64_t unseen;        // the weight that unseen items are drawn with
  int64_t offset;        // added to every weight (flattening by "mix")
  int64_t ceiling;       // no light item weighs more than this
  int64_t capped_floor;  // no capped item weighs less than this
  int64_t near_size, near_low, near_high;  // see csrc/cpu/tree.h
  int64_t num_listed, num_flipped;         // see csrc/cpu/tree.h
  int64_t reserved[5];
};
static_assert(sizeof(Scalars) == 24 * 8);

// Moving averages of the minibatch moments and what follows from them (math: variance traces).
struct Variance {
  double weight, second, uniform, first_squared, mean_squared;  // 1, A, U, O^2, |G|^2
  double trace_is, trace_uniform, trace_optimal, effective_batch_size, efficiency;
  double factor, gain;  // of the learning rate: N_ems / B, and the gain of a larger minibatch
};
static_assert(sizeof(Variance) == 12 * 8);

enum class Flatten : int { none = 0, cap = 1, mix = 2 };
enum class Scheme : int { multinomial = 0, stratified = 1, systematic = 2 };

constexpr int kLeaf = 4;    // records below a node of level 0: one cache line of them
constexpr int kRadix = 16;  // nodes of a level below one of the next
constexpr int kMaxLevels = 10;
constexpr int64_t kNoCap = int64_t{1} << 62;

// The tree over the records: level 0 has one node per kLeaf records, the top at most `most` nodes.
struct Levels {
  int depth = 0;
  int64_t first[kMaxLevels], size[kMaxLevels];  // nodes; a level starts on a multiple of kRadix

  FASTIS_HD explicit Levels(int64_t num_samples, int64_t most = kRadix) {
    int64_t nodes = (num_samples + kLeaf - 1) / kLeaf, start = 0;
    for (;; nodes = (nodes + kRadix - 1) / kRadix) {
      first[depth] = start;
      size[depth] = nodes;
      start += (nodes + kRadix - 1) / kRadix * kRadix;
      ++depth;
      if (nodes <= most) break;
    }
    total_ = start;
  }
  FASTIS_HD int64_t total() const { return total_; }

  // The node of `level` above a record.
  FASTIS_HD static int64_t above(int64_t index, int level) { return index >> (2 + 4 * level); }

 private:
  int64_t total_ = 0;
};
static_assert(kLeaf == 1 << 2 && kRadix == 1 << 4);

// A raw device or host address that arrives from Python as an integer (0: no such tensor).
template <class T>
struct Pointer {
  T* address = nullptr;
  FASTIS_HD operator T*() const { return address; }
  FASTIS_HD T* operator->() const { return address; }
};

// A minibatch of B as it is drawn.
struct Batch {
  Pointer<int64_t> indices;  // [B]
  Pointer<float> weights;    // [B] coefficients
};

struct Table {
  // Tensors. N: num_samples, K: levels.total().
  Record* records = nullptr;     // [N, to a multiple of kLeaf], null for the uniform methods
  Scalars* scalars = nullptr;    // [1]
  Variance* variance = nullptr;  // [1]
  // Where a node begins in its group of 16: sums over the siblings before it, so that finding a
  // child is 16 comparisons at once.
  uint64_t* starts = nullptr;         // [K] of the weights of seen light items
  uint32_t* unseen_starts = nullptr;  // [K] of the numbers of unseen items
  uint32_t* capped_starts = nullptr;  // [K] of the numbers of capped items
  int64_t* near = nullptr;            // [near_capacity] items that theta may pass next
  int64_t* listed = nullptr;          // [2 x list_capacity] the capped items, ascending
  int64_t* flipped = nullptr;         // [list_capacity] items that were capped since, or no longer
  int64_t near_capacity = 0, list_capacity = 0;  // list_capacity 0: capped items are not listed

  // Constants.
  int64_t num_samples = 0, batch_size = 0, warmup_draws = 0, batches_per_epoch = 0;
  uint64_t seed = 0;
  uint64_t cap_numerator = 0, cap_denominator = 1;  // D of math: flattening, as a ratio
  int64_t total_limit = 0;                          // rescale above this total
  int headroom = 0;                                 // see exponent_for()
  double floor = 0, smoothing = 0;
  float tau = 0;  // 0: linear; below 0: the state is the last observation
  float tau_scale = 1;
  bool unbiased = true;
  Importance importance = Importance::rms;
  Flatten flatten = Flatten::none;
  Scheme scheme = Scheme::multinomial;
  Levels levels{1};
};

// The iteration `updates` as records hold it: modulo 2^31, so that no run is too long.
FASTIS_HD inline int32_t clock_of(int64_t updates) {
  return static_cast<int32_t>(updates & 0x7FFFFFFF);
}

// Iterations since a sample was last observed, modulo 2^31. 0: the present iteration has nothing to
// add, since the sample was observed in it, or in a later one (by up to kLate).
constexpr uint32_t kLate = 1u << 20;
FASTIS_HD inline int32_t interval(int32_t now, int32_t last) {
  const uint32_t passed = (static_cast<uint32_t>(now) - static_cast<uint32_t>(last)) & 0x7FFFFFFFu;
  return passed > 0x7FFFFFFFu - kLate ? 0 : static_cast<int32_t>(passed);
}

// The time constant of the averages in iteration `updates`: the table's, or linear in it.
FASTIS_HD inline float tau_at(const Table& t, int64_t updates) {
  if (t.tau > 0) return t.tau;
  const float linear = t.tau_scale * static_cast<float>(updates);
  return linear > 1.0f ? linear : 1.0f;
}

// Is the sum of all weights, those of the unseen included, more than the draw has room for?
FASTIS_HD inline bool exceeds_limit(const Table& t) {
  const Scalars& s = *t.scalars;
  if (s.total > t.total_limit) return true;
  const int64_t unseen = t.num_samples - s.seen;
  return s.seen > 0 && unseen > 0 && s.total / s.seen > (t.total_limit - s.total) / unseen;
}

// Rescaling puts the floor's exponent `headroom` above e0, so that the mean may fall by that many
// powers of two (and rise by about as many) before the next one.
FASTIS_HD inline int exponent_for(float floor, int headroom) {
  return exponent_of(code_of(floor, 0.0f)) - headroom;
}

// Flattening by "mix": the least constant c with B (peak + c) <= D (total + N c).
FASTIS_HD inline int64_t mix_offset(uint64_t peak, uint64_t total, const Table& t) {
  const __int128 batch = static_cast<__int128>(t.batch_size) * t.cap_denominator;
  const __int128 over = batch * peak - static_cast<__int128>(t.cap_numerator) * total;
  const __int128 divisor = static_cast<__int128>(t.cap_numerator) * t.num_samples - batch;
  return over <= 0 ? 0 : static_cast<int64_t>((over + divisor - 1) / divisor);
}

// The largest shift of a mantissa that n new weights can have without overflowing a sum.
FASTIS_HD inline int max_shift(int64_t n) { return 61 - 16 - ceil_log2(static_cast<uint64_t>(n)); }

}  // namespace fastis
