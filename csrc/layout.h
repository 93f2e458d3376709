// A sampler's memory as the kernels see it: addresses of tensors that Python owns, and constants.
#pragma once

#include <cstdint>

#include "code.h"
#include "divisor.h"

namespace fastis {

// One int64 each, on the sampler's device; fastis/kernels/layout.py names the same positions.
struct Scalars {
  int64_t draws;         // minibatches issued: the clock of the randomness and of the warm-up
  int64_t updates;       // minibatches observed: the clock of the moving averages
  int64_t skipped;       // non-finite scores left out
  int64_t exponent;      // e0 of code.h; kNoExponent while nothing has been seen
  int64_t total;         // sum of the integer weights of the seen samples
  int64_t seen;          // how many those are
  int64_t uniform_from;  // from this draw on without replacement, as in the warm-up; or kNever
  int64_t pause;         // see is_paused()
  int64_t valid;         // does the tree below match the codes?
  int64_t uncapped;      // sum of the tree: the total less the capped items
  int64_t num_capped;    // items above theta, kept outside the tree
  int64_t theta;         // the weight that capped items are drawn with (2^62: no cap)
  int64_t unseen;        // the weight that unseen items are drawn with
  int64_t offset;        // added to every weight (flattening by "mix"); < 0: all are drawn alike
  int64_t ceiling;       // no uncapped item weighs more than this
  int64_t capped_floor;  // no capped item weighs less than this
  int64_t near_size, near_low, near_high;  // see csrc/cpu/tree.h
  int64_t num_listed, num_flipped;         // see csrc/cpu/tree.h
  Others others;  // of the shards beside this one, as last heard of; zeros for a table on its own
  int64_t excluded;  // how many samples are never drawn
};
static_assert(sizeof(Scalars) == 24 * 8);

// Moving averages of the minibatch moments and what follows from them (math: variance traces).
struct Variance {
  double weight, second, uniform, first_squared, mean_squared;  // 1, A, U, O^2, |G|^2
  double trace_is, trace_uniform, trace_optimal, effective_batch_size, efficiency;
  double factor, gain;       // of the learning rate: N_ems / B, and the gain of a larger minibatch
  double paused_efficiency;  // S when importance sampling was paused; below 0 while it isn't
};
static_assert(sizeof(Variance) == 13 * 8);

enum class Flatten : int { none = 0, cap = 1, mix = 2 };
enum class Scheme : int { multinomial = 0, stratified = 1, systematic = 2 };

constexpr int kLeaf = 4;    // states below a node of level 0: one cache line of them
constexpr int kRadix = 16;  // nodes of a level below one of the next
constexpr int kMaxLevels = 10;
constexpr int64_t kNoCap = int64_t{1} << 62;
constexpr int64_t kNever = int64_t{1} << 62;  // a draw

// The tree over the states: level 0 has one node per kLeaf states, the top at most `most` nodes.
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

  // The node of `level` above a sample.
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

// What is learnt of a minibatch of n, in the order of fastis.batch.Observation. Without weights and
// score it was not drawn: the states learn of it, and neither the variance averages nor the clock.
struct Observation {
  Pointer<const int64_t> indices;  // [n]
  Pointer<const float> weights;    // [n] coefficients that they were drawn with
  Pointer<const float> observed;   // [n] what the states average: the score, or the loss
  Pointer<const float> score;      // [n] for the variance traces
  int64_t n;
  Pointer<const float> mean_grad;  // [C] minibatch mean of r g
  int64_t num_classes;
};

// The tensors that a resumed run needs.
struct Durable {
  Pointer<int64_t> scalars;    // the first of Scalars
  Pointer<Variance> variance;  // [1]
  Pointer<State> states;       // [N], or null
};

// A minibatch of B as it is drawn.
struct Batch {
  Pointer<int64_t> indices;  // [B]
  Pointer<float> weights;    // [B] coefficients
};

// A rank's part of a minibatch of all shards. Weights there are integers too, 2^shift as large as
// in the shard, and up to 2^127: the ranks' totals lie side by side in [0, total).
struct Share {
  uint64_t seed;         // of the draws, the same on all ranks
  int64_t first, count;  // draws of the minibatch to look at: no others can be the rank's
  uint64_t batch_size;   // of all ranks
  double num_samples;    // of all ranks
  int shift;
  uint64_t total_low, total_high;
  uint64_t before_low, before_high;  // the total of the ranks before this one
  uint64_t own_low, own_high;        // this rank's
  uint64_t theta_low, theta_high;    // the weight of capped items
};

struct Table {
  // Tensors. N: num_samples, K: levels.total().
  State* states = nullptr;       // [N, to a multiple of kLeaf], null for the uniform methods
  Scalars* scalars = nullptr;    // [1]
  Variance* variance = nullptr;  // [1]
  // For each of a node's 16 children the sum over the siblings before it, so that finding a child
  // is 16 comparisons at once.
  uint64_t* prefix = nullptr;         // [K] weights of seen, uncapped items
  uint32_t* unseen_prefix = nullptr;  // [K] numbers of unseen items
  uint32_t* capped_prefix = nullptr;  // [K] numbers of capped items
  // [K + 1] numbers of excluded items, and whether one of these is not 0: this memory is touched
  // only where something was excluded.
  uint32_t* excluded_prefix = nullptr;
  int64_t* near = nullptr;     // [near_capacity] items that theta may pass next
  int64_t* listed = nullptr;   // [2 x list_capacity] the capped items, ascending
  int64_t* flipped = nullptr;  // [list_capacity] items that were capped since, or no longer
  int64_t near_capacity = 0, list_capacity = 0;  // list_capacity 0: capped items are not listed

  // Constants.
  int64_t num_samples = 0, batch_size = 0, warmup_draws = 0, batches_per_epoch = 0;
  uint64_t seed = 0;
  uint64_t cap_numerator = 0, cap_denominator = 1;  // D of math: flattening, as a ratio
  int64_t total_limit = 0;                          // rescale above this total
  int headroom = 0;                                 // see rescale()
  double floor = 0, smoothing = 0;
  double least_gain = 0;  // importance sampling pauses below it
  float tau = 0;          // 0: linear; below 0: the state is the last observation
  float tau_scale = 1;
  bool unbiased = true;
  bool shard = false;         // of a larger table: theta is held, not found
  bool keeps_moments = true;  // in an update; else they are kept for several tables elsewhere
  Importance importance = Importance::rms;
  Flatten flatten = Flatten::none;
  Scheme scheme = Scheme::multinomial;
  Levels levels{1};

  // What would be divisions.
  uint64_t max_capped = 0;  // the most items that can be at the cap, ceil(B/D) - 1
  uint64_t max_alike = 0;   // so many active items, or fewer, meet the cap only if all are alike
  uint64_t theta_quotient = 0;  // 2^62 / numerator of D
  Divisor batch;                // B

  void derive() {
    const uint64_t most = static_cast<uint64_t>(batch_size) * cap_denominator;
    max_capped = (most - 1) / cap_numerator;
    max_alike = flatten == Flatten::none ? 0 : most / cap_numerator;
    theta_quotient = static_cast<uint64_t>(kNoCap) / cap_numerator;
    batch = Divisor(static_cast<uint64_t>(batch_size));
  }
};

// How many samples are drawn from: all but the excluded ones. The N of coefficients.
FASTIS_HD inline int64_t active(const Table& t) { return t.num_samples - t.scalars->excluded; }

// Whether the cap leaves nothing but to draw all active items alike, since so many are excluded.
FASTIS_HD inline bool drawn_alike(const Table& t) {
  return t.scalars->excluded > 0 && static_cast<uint64_t>(active(t)) <= t.max_alike;
}

FASTIS_HD inline int exponent_of_table(const Table& t) {
  return static_cast<int>(t.scalars->exponent);
}

// floor((b total + u) / B) without leaving 64 bits: a point in slice b of B from one below the
// total.
FASTIS_HD inline uint64_t slice_point(const Table& t, uint64_t b, uint64_t u, uint64_t total) {
  const uint64_t quotient = t.batch.divide(total), remainder = total - quotient * t.batch.value;
  return b * quotient + t.batch.divide(b * remainder + u);
}

// Whether draws pause from importance sampling. The word says from which draw on (bits 1 and up)
// they do or don't (bit 0); before that draw it was the other way. So a draw that runs beside the
// update that changes the word reads the same from the old word and from the new one.
FASTIS_HD inline bool is_paused(int64_t word, int64_t draw) {
  return (draw >= word >> 1) == ((word & 1) != 0);
}

// Whether a minibatch is drawn without replacement, with coefficients of 1.
FASTIS_HD inline bool without_replacement(const Table& t, int64_t draw) {
  const Scalars& s = *t.scalars;
  return draw < t.warmup_draws || draw >= s.uniform_from || is_paused(s.pause, draw);
}

// Of epochs of the active samples.
FASTIS_HD inline int64_t batches_per_epoch(const Table& t) {
  if (t.scalars->excluded == 0) return t.batches_per_epoch;
  const auto length = static_cast<int64_t>(t.batch.divide(static_cast<uint64_t>(active(t))));
  return length > 1 ? length : 1;
}

// Such a minibatch's place: its epoch, which keys the permutation, and its first position there.
// Epochs of the warm-up are counted; later ones have the number of their first minibatch, which is
// no epoch's of the warm-up. Those that the user asks for are whole. An epoch is one of the active
// samples; of fewer than B it is a minibatch, which begins again where it ends.
struct InEpoch {
  int64_t epoch, first;

  FASTIS_HD InEpoch(const Table& t, int64_t draw) {
    const int64_t from = t.scalars->uniform_from, since = draw >= from ? draw - from : draw;
    const int64_t length = batches_per_epoch(t), epochs = since / length;
    const int64_t minibatch = since - epochs * length;
    epoch = draw < t.warmup_draws ? epochs : draw - minibatch;
    first = minibatch * t.batch_size;
  }
};

// The iteration `updates` as states hold it: modulo 2^31, so that no run is too long.
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

// The largest shift of a mantissa that n new weights can have without overflowing a sum.
FASTIS_HD inline int max_shift(int64_t n) { return 61 - 16 - ceil_log2(static_cast<uint64_t>(n)); }

// What the items of one update have in common.
struct UpdateParameters {
  int32_t now;  // the present iteration
  float tau, floor;
  int exponent, max_shift;  // e0; new codes must be in [e0, e0 + max_shift]
  bool valid;               // is there a tree to keep?
  uint64_t theta;           // items above it are capped

  FASTIS_HD UpdateParameters(const Table& t, int64_t n)
      : UpdateParameters(t, n, t.scalars->updates) {}

  // ... of an iteration that is not the present one.
  FASTIS_HD UpdateParameters(const Table& t, int64_t n, int64_t iteration)
      : now(clock_of(iteration)),
        tau(tau_at(t, iteration)),
        floor(floor_above(floors_of(static_cast<uint64_t>(t.scalars->total), t.scalars->seen,
                                    exponent_of_table(t), t.floor, t.scalars->others),
                          exponent_of_table(t))),
        exponent(exponent_of_table(t)),
        max_shift(fastis::max_shift(n)),
        valid(t.scalars->valid != 0),
        theta(static_cast<uint64_t>(valid ? t.scalars->theta : kNoCap)) {}
};

}  // namespace fastis
