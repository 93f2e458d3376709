// Fixed weights: quantized to integers, with a power of two that brings their sum to about 2^61,
// and drawn from by search in the prefix sums of groups of 64. Nothing else is built, so this is
// for a few draws from weights that change.
//
// The integers are floor(w 2^shift), at least 1 where w > 0; quantize() finds the shift and the
// sums in one pass over the floats if it can. A sum of floats in doubles is exact where all of them
// are multiples of one power of two and the sum is below 2^53 times that; and the integers add up
// to it where that power times 2^shift is at least 1, so that nothing is cut off. A chunk for which
// this can't be certified is read again, in integers. Bytes moved: the weights once, or twice where
// chunks are not certified (always in float64). A draw: a cache line for each of log2(N / 64)
// steps, and a group of weights.
#include "cpu/categorical.h"

#include "fastis.h"

namespace fastis::FASTIS_ISA {
namespace {

constexpr int kChunk = 1024;  // weights that are certified together
constexpr int kSumBits = 61;
constexpr int kRounded = -(1 << 20), kZero = 1 << 20;

struct Chunk {
  double least, most, sum;
  int lowest;  // all sums are multiples of 2^lowest; kRounded: perhaps not exact; kZero: all are 0
};

// Of a positive number that is not subnormal: its binary exponent.
int exponent_of(double x) { return static_cast<int>(bit_cast<uint64_t>(x) >> 52) - 1023; }

template <class F>
double reduce_min(Vec<F> x) {
  F least = x[0];
  for (int i = 1; i < kLanes<F>; ++i) least = x[i] < least ? x[i] : least;
  return static_cast<double>(least);
}

// What is kept over the weights of a chunk, lane by lane.
template <class F>
struct Extremes {
  Vec<F> least = splat<F>(kInf), most = splat<F>(0), positive = splat<F>(kInf);
  static constexpr F kInf = F(__builtin_inf());

  void add(Vec<F> w) {
    least = min<F>(w, least);
    most = max<F>(w, most);
    positive = min<F>(select<F>(w > F(0), w, splat<F>(kInf)), positive);
  }
};

// The sum of a whole group; four sums side by side hide the latency of the additions.
template <class S>
__attribute__((always_inline)) inline double sum_group(const S* weights,
                                                       Extremes<Compute<S>>& extremes) {
  constexpr int kStep = kLanes<Compute<S>>,
                kParts = sizeof(Doubles<Compute<S>>) / sizeof(Vec<double>);
  constexpr int kAbreast = 4 / kParts;
  Vec<double> sums[4] = {};
  for (int i = 0; i < kGroup; i += kAbreast * kStep) {
#pragma GCC unroll 4
    for (int v = 0; v < kAbreast; ++v) {
      const auto w = load(weights + i + v * kStep);
      extremes.add(w);
      const auto doubles = to_doubles(w);
#pragma GCC unroll 2
      for (int part = 0; part < kParts; ++part) sums[v * kParts + part] += doubles.part[part];
    }
  }
  return reduce_add<double>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The last group, filled up with zeros.
template <class S>
struct Padded {
  S weights[kGroup] = {};
  Padded(const S* some, int count) { std::memcpy(weights, some, sizeof(S) * count); }
};

template <class S>
Chunk reduce(const S* weights, int count, double* sums) {
  using F = Compute<S>;
  Extremes<F> extremes;
  Chunk chunk{};
  for (int begin = 0; begin < count; begin += kGroup) {
    const bool full = count - begin >= kGroup;
    sums[begin / kGroup] =
        full ? sum_group(weights + begin, extremes)
             : sum_group(Padded<S>(weights + begin, count - begin).weights, extremes);
    chunk.sum += sums[begin / kGroup];
  }
  chunk.least = reduce_min<F>(extremes.least);
  chunk.most = static_cast<double>(reduce_max<F>(extremes.most));
  if (chunk.most == 0) {
    chunk.lowest = kZero;
  } else {
    constexpr int kGroupBits = 6;
    static_assert(kGroup == 1 << kGroupBits);
    chunk.lowest = exponent_of(reduce_min<F>(extremes.positive)) - (kDigits<S> - 1);
    const int highest = exponent_of(chunk.most) + kGroupBits;
    if (highest - chunk.lowest >= 53) chunk.lowest = kRounded;
  }
  return chunk;
}

// Integers already: nothing to reduce, and quantize() gives them no shift.
Chunk reduce(const int64_t*, int, double*) { return {0, 1, 0, kRounded}; }

// The sums of groups of integers, in place of those of their floats where these are exact.
void sum_groups(const IntegerWeights& weights, int64_t first, int count, bool exact,
                uint64_t* sums) {
  const int groups = (count + kGroup - 1) / kGroup;
  alignas(64) uint64_t integer[kChunk];
  if (exact) {
    quantize_values(reinterpret_cast<double*>(sums), groups, weights.shift, integer);
    std::memcpy(sums, integer, sizeof(uint64_t) * groups);
    return;
  }
  read(weights, first, count, integer);
  for (int g = 0; g < groups; ++g) {
    const int end = (g + 1) * kGroup < count ? (g + 1) * kGroup : count;
    uint64_t sum = 0;
    for (int i = g * kGroup; i < end; ++i) sum += integer[i];
    sums[g] = sum;
  }
}

int bit_length(uint64_t x) { return x == 0 ? 0 : 64 - __builtin_clzll(x); }

// Weights cut into chunks.
struct Chunks {
  const IntegerWeights& weights;
  int threads;
  int64_t count = (weights.n + kChunk - 1) / kChunk;

  int size(int64_t chunk) const {
    const int64_t left = weights.n - chunk * kChunk;
    return static_cast<int>(left < kChunk ? left : kChunk);
  }

  uint64_t total_with(int shift) const {
    IntegerWeights shifted = weights;
    shifted.shift = shift;
    uint64_t sum = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : sum) if (threads > 1)
    for (int64_t chunk = 0; chunk < count; ++chunk) {
      alignas(64) uint64_t integer[kChunk];
      read(shifted, chunk * kChunk, size(chunk), integer);
      for (int i = 0; i < size(chunk); ++i) sum += integer[i];
    }
    return sum;
  }

  // 61 - bit_length(sum of the integers at the first shift, plus n) below, from the sum of the
  // floats if that tells; it is right to 2^-24, and each integer is off by less than 1.
  int spare_bits(double sum, int first) const {
    const double scaled = __builtin_ldexp(sum, first), slack = scaled * 0x1p-24;
    const double low = scaled - slack, high = scaled + slack + 2.0 * static_cast<double>(weights.n);
    if (low > 1 && high < 0x1p62 && exponent_of(low) == exponent_of(high)) {
      return kSumBits - 1 - exponent_of(low);
    }
    return kSumBits - bit_length(total_with(first) + static_cast<uint64_t>(weights.n));
  }
};

constexpr int kDraws = 64;  // searched abreast, so that their cache misses overlap

// group[i]: the first whose prefix sum is above points[i].
void find_groups(const uint64_t* prefix, int64_t groups, const uint64_t* points, int size,
                 int64_t* group) {
  for (int i = 0; i < size; ++i) group[i] = 0;
  for (int64_t length = groups; length > 1;) {
    const int64_t half = length / 2;
    length -= half;
    for (int i = 0; i < size; ++i) {
      group[i] += prefix[group[i] + half - 1] <= points[i] ? half : 0;
      __builtin_prefetch(prefix + group[i] + length / 2 - 1);
    }
  }
}

}  // namespace

bool quantize(const IntegerWeights& unshifted, int threads, Pointer<int64_t> shift_and_total) {
  IntegerWeights weights = unshifted;
  const Chunks chunks{weights, threads};
  constexpr int kGroups = kChunk / kGroup;
  const Scratch<Chunk> chunk_of(chunks.count);
  uint64_t* const prefix = weights.prefix;
  double* const sums = reinterpret_cast<double*>(prefix);  // until they are integers
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    chunk_of[chunk] = visit(weights, [&](const auto* w) {
      return reduce(w + chunk * kChunk, chunks.size(chunk), sums + chunk * kGroups);
    });
  }
  double least = 0, most = 0, sum = 0;
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    least = chunk_of[chunk].least < least ? chunk_of[chunk].least : least;
    most = chunk_of[chunk].most > most ? chunk_of[chunk].most : most;
    sum += chunk_of[chunk].sum;
  }
  const bool usable = least >= 0 && most > 0 && most < __builtin_inf() && sum == sum;
  if (!usable) return false;
  if (weights.format != fastis::Format::int64) {
    int exponent;
    __builtin_frexp(most, &exponent);  // most < 2^exponent
    const int first = kSumBits - bit_length(static_cast<uint64_t>(weights.n - 1)) - exponent;
    weights.shift = first + chunks.spare_bits(sum, first);
  }
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    sum_groups(weights, chunk * kChunk, chunks.size(chunk),
               chunk_of[chunk].lowest + weights.shift >= 0, prefix + chunk * kGroups);
  }
  uint64_t total = 0;
  for (int64_t g = 0; g < (weights.n + kGroup - 1) / kGroup; ++g) prefix[g] = total += prefix[g];
  shift_and_total[0] = weights.shift;
  shift_and_total[1] = static_cast<int64_t>(total);
  return true;
}

void integer_weights(const IntegerWeights& weights, int threads, Pointer<uint64_t> out) {
  const Chunks chunks{weights, threads};
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    alignas(64) uint64_t buffer[kChunk];
    read(weights, chunk * kChunk, chunks.size(chunk), buffer);
    std::memcpy(out + chunk * kChunk, buffer, sizeof(uint64_t) * chunks.size(chunk));
  }
}

void categorical_draw(const IntegerWeights& weights, const Draws& draws, const Batch& batch) {
  const int64_t n = weights.n, groups = (n + kGroup - 1) / kGroup;
  const uint64_t* const prefix = weights.prefix;
  const double total = static_cast<double>(weights.total), items = static_cast<double>(n);
  for (int64_t b = 0; b < draws.count; b += kDraws) {
    const int size = draws.count - b < kDraws ? static_cast<int>(draws.count - b) : kDraws;
    uint64_t points[kDraws];
    int64_t group[kDraws];
    random_points(draws.seed, Stream::weights, 0, draws.first + b, size, weights.total, points);
    find_groups(prefix, groups, points, size, group);
    for (int i = 0; i < size; ++i) {
      const int64_t begin = group[i] * kGroup;
      alignas(64) uint64_t integer[kGroup];
      read(weights, begin, static_cast<int>(n - begin < kGroup ? n - begin : kGroup), integer);
      uint64_t x = points[i] - (group[i] > 0 ? prefix[group[i] - 1] : 0);
      int item = 0;
      while (x >= integer[item]) x -= integer[item++];
      batch.indices[b + i] = begin + item;
      batch.weights[b + i] = coefficient_of(total, items, integer[item]);
    }
  }
}

void random_below(uint64_t total, const Draws& draws, Pointer<uint64_t> out) {
  random_points(draws.seed, Stream::weights, 0, draws.first, draws.count, total, out);
}

}  // namespace fastis::FASTIS_ISA
