// From float weights to integer ones: the power of two that brings their sum to about 2^61, the
// running sums of groups of 64, and the integers themselves where they are wanted.
//
// The integers are floor(w 2^shift), at least 1 where w > 0; weigh() finds the shift and the sums
// in one pass over the floats if it can. A sum of floats in doubles is exact where all of them are
// multiples of one power of two and the sum is below 2^53 times that; and the integers add up to it
// where that power times 2^shift is at least 1, so that nothing is cut off. A chunk for which this
// can't be certified is read again, in integers.
// Bytes moved: the weights once, or twice where chunks are not certified (always in float64).
#include "cpu/integers.h"
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

// The sum of a whole group; four running sums hide the latency of the additions.
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
Chunk survey(const S* weights, int count, double* sums) {
  using F = Compute<S>;
  Extremes<F> extremes;
  Chunk chunk{};
  for (int begin = 0; begin < count; begin += kGroup) {
    const bool whole = count - begin >= kGroup;
    sums[begin / kGroup] =
        whole ? sum_group(weights + begin, extremes)
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

// Integers already: nothing to survey, and weigh() gives them no shift.
Chunk survey(const int64_t*, int, double*) { return {0, 1, 0, kRounded}; }

int bit_length(uint64_t x) { return x == 0 ? 0 : 64 - __builtin_clzll(x); }

struct Survey {
  const Weights& weights;
  int64_t chunks;
  int threads;
  const Chunk* of;

  int size(int64_t chunk) const {
    const int64_t left = weights.n - chunk * kChunk;
    return static_cast<int>(left < kChunk ? left : kChunk);
  }

  uint64_t sum_of_integers(int shift) const {
    const Weights shifted{weights.format, weights.values, weights.n, shift};
    uint64_t sum = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : sum) if (threads > 1)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      alignas(64) uint64_t integers[kChunk];
      const int count = size(chunk);
      shifted.read(chunk * kChunk, count, integers);
      for (int i = 0; i < count; ++i) sum += integers[i];
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
    return kSumBits - bit_length(sum_of_integers(first) + static_cast<uint64_t>(weights.n));
  }
};

}  // namespace

bool weigh(int format, Pointer<const void> values, int64_t n, int threads, Pointer<uint64_t> ends,
           Pointer<int64_t> shift_and_total) {
  Weights weights{format, values, n, 0};
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  constexpr int kGroups = kChunk / kGroup;
  const Scratch<Chunk> chunk_of(chunks);
  const Survey survey_of{weights, chunks, threads, chunk_of};
  double* const sums = reinterpret_cast<double*>(ends.address);  // until they are integers
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    chunk_of[chunk] = weights.visit([&](const auto* w) {
      return survey(w + chunk * kChunk, survey_of.size(chunk), sums + chunk * kGroups);
    });
  }
  double least = 0, most = 0, sum = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    least = chunk_of[chunk].least < least ? chunk_of[chunk].least : least;
    most = chunk_of[chunk].most > most ? chunk_of[chunk].most : most;
    sum += chunk_of[chunk].sum;
  }
  const bool usable = least >= 0 && most > 0 && most < __builtin_inf() && sum == sum;
  if (!usable) return false;
  if (format != kIntegers) {
    int exponent;
    __builtin_frexp(most, &exponent);  // most < 2^exponent
    const int first = kSumBits - bit_length(static_cast<uint64_t>(n - 1)) - exponent;
    weights.shift = first + survey_of.spare_bits(sum, first);
  }
  const int shift = weights.shift;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int count = survey_of.size(chunk), groups = (count + kGroup - 1) / kGroup;
    uint64_t* const out = ends + chunk * kGroups;
    alignas(64) uint64_t integers[kChunk];
    if (chunk_of[chunk].lowest + shift >= 0) {
      read_integers(sums + chunk * kGroups, groups, shift, integers);
      for (int g = 0; g < groups; ++g) out[g] = integers[g];
      continue;
    }
    weights.read(chunk * kChunk, count, integers);
    for (int g = 0; g < groups; ++g) {
      const int end = (g + 1) * kGroup < count ? (g + 1) * kGroup : count;
      uint64_t group_sum = 0;
      for (int i = g * kGroup; i < end; ++i) group_sum += integers[i];
      out[g] = group_sum;
    }
  }
  uint64_t total = 0;
  for (int64_t g = 0; g < (n + kGroup - 1) / kGroup; ++g) ends[g] = total += ends[g];
  shift_and_total[0] = shift;
  shift_and_total[1] = static_cast<int64_t>(total);
  return true;
}

void integers(int format, Pointer<const void> values, int64_t n, int shift, int threads,
              Pointer<uint64_t> out) {
  const Weights weights{format, values, n, shift};
  const int64_t chunks = (n + kChunk - 1) / kChunk;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    alignas(64) uint64_t buffer[kChunk];
    const int64_t begin = chunk * kChunk;
    const int count = static_cast<int>(n - begin < kChunk ? n - begin : kChunk);
    weights.read(begin, count, buffer);
    std::memcpy(out + begin, buffer, sizeof(uint64_t) * count);
  }
}

}  // namespace fastis::FASTIS_ISA
