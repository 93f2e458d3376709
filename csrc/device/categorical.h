// Fixed weights on the device: their largest value and sum, their integers (as cpu/categorical.h
// makes them), and draws by search in prefix sums over tiles of integers. Each is written for one
// thread's share; csrc/cuda/categorical.cu hands out the shares.
#pragma once

#include <cstring>

#include "device/grid.h"
#include "integer_weights.h"

namespace fastis::device {

constexpr int kQuad = 4;               // weights that a thread reads by one access
constexpr int kTile = 256;             // weights to one prefix sum
constexpr int kQuads = kTile / kQuad;  // quads to a tile

// w = mantissa 2^exponent of a number with `kFraction` bits below the leading one, whose exponent
// field counts from -kBias. The sign is left out: -0 is 0, and others are refused by reduce().
template <class Bits, int kFraction, int kBias>
struct Binary {
  uint64_t mantissa;
  int exponent;
  bool finite, negative;

  FASTIS_HD explicit Binary(Bits bits) {
    constexpr int kFieldBits = 8 * static_cast<int>(sizeof(Bits)) - 1 - kFraction;
    constexpr int kLast = (1 << kFieldBits) - 1;
    const int field = static_cast<int>(bits >> kFraction) & kLast;
    const uint64_t fraction = bits & ((uint64_t{1} << kFraction) - 1);
    mantissa = field == 0 ? fraction : fraction | uint64_t{1} << kFraction;
    exponent = (field == 0 ? 1 : field) - kBias - kFraction;
    finite = field != kLast;
    negative = mantissa != 0 && (bits >> (8 * sizeof(Bits) - 1)) != 0;
  }

  FASTIS_HD uint64_t times_two_to(int shift) const {
    const int by = exponent + shift;
    const uint64_t value = by >= 64    ? 0  // a mantissa of 0, since no weight exceeds 2^62
                           : by >= 0   ? mantissa << by
                           : by <= -64 ? 0
                                       : mantissa >> -by;
    return value == 0 && mantissa != 0 ? 1 : value;
  }
};
using Float32 = Binary<uint32_t, 23, 127>;
using Float64 = Binary<uint64_t, 52, 1023>;
using BFloat16 = Binary<uint16_t, 7, 127>;
using Float16 = Binary<uint16_t, 10, 15>;

// Up to four weights that lie side by side, as integers; 0 beyond the last.
struct Quad {
  uint64_t weight[kQuad];
  int size;

  // Number j of them. (An index that is known only then would put all four into local memory.)
  FASTIS_HD uint64_t at(int64_t j) const {
    return j < 2 ? (j == 0 ? weight[0] : weight[1]) : (j == 2 ? weight[2] : weight[3]);
  }
};

FASTIS_HD inline int64_t tiles_of(int64_t n) { return (n + kTile - 1) / kTile; }

// Weights read four at a time and added up by tiles.
struct TiledWeights : IntegerWeights {
  FASTIS_HD explicit TiledWeights(const IntegerWeights& weights) : IntegerWeights(weights) {}

  FASTIS_HD int64_t quads() const { return (n + kQuad - 1) / kQuad; }
  FASTIS_HD int64_t tiles() const { return tiles_of(n); }

  // visit(weight, position in the quad) for what there is of a quad, as a Binary or an int64_t.
  template <class Visit>
  FASTIS_HD void each(int64_t quad, const Visit& visit) const {
    switch (format) {
      case Format::float32:
        return each_of<uint32_t, Float32>(quad, visit);
      case Format::float64:
        return each_of<uint64_t, Float64>(quad, visit);
      case Format::bfloat16:
        return each_of<uint16_t, BFloat16>(quad, visit);
      case Format::float16:
        return each_of<uint16_t, Float16>(quad, visit);
      default:
        return each_of<int64_t, int64_t>(quad, visit);
    }
  }

  FASTIS_HD Quad read(int64_t quad) const {
    const int64_t left = n - quad * kQuad;
    Quad result{{0, 0, 0, 0}, left < kQuad ? static_cast<int>(left) : kQuad};
    each(quad, [&](const auto& weight, int j) { result.weight[j] = integer_of(weight); });
    return result;
  }

 private:
  template <class Bits>
  struct alignas(sizeof(Bits) < 4 ? 8 : 16) Four {
    Bits bits[kQuad];
  };

  template <class Bits, class Number, class Visit>
  FASTIS_HD void each_of(int64_t quad, const Visit& visit) const {
    const int64_t first = quad * kQuad;
    const Bits* const from = static_cast<const Bits*>(values.address) + first;
    Four<Bits> four{};
    if (first + kQuad <= n) {
      four = *reinterpret_cast<const Four<Bits>*>(from);
    } else {
      for (int j = 0; j < kQuad; ++j) four.bits[j] = first + j < n ? from[j] : 0;
    }
    for (int j = 0; j < kQuad; ++j) visit(Number(four.bits[j]), j);
  }

  FASTIS_HD static uint64_t integer(int64_t weight, int) { return static_cast<uint64_t>(weight); }
  template <class Number>
  FASTIS_HD static uint64_t integer(const Number& weight, int shift) {
    return weight.times_two_to(shift);
  }
  template <class Number>
  FASTIS_HD uint64_t integer_of(const Number& weight) const {
    return integer(weight, shift);
  }
};

// What the shift follows from. The sum is only known to about 2^-29 of itself: in which order
// floats are added is left open.
struct Reduction {
  double most = 0, sum = 0;
  int64_t unusable = 0;  // how many are negative or not finite

  FASTIS_HD Reduction operator+(const Reduction& o) const {
    return {most > o.most ? most : o.most, sum + o.sum, unusable + o.unusable};
  }
};
static_assert(sizeof(Reduction) == 24);

FASTIS_HD inline double bits_to_double(uint64_t bits) {
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FASTIS_HD inline double value_of(int64_t weight) { return static_cast<double>(weight); }
template <class Number>
FASTIS_HD inline double value_of(const Number& weight) {
  // In two factors: 2^-1074 has no bits of its own.
  const double power = bits_to_double(static_cast<uint64_t>(weight.exponent / 2 + 1023) << 52);
  const int rest = weight.exponent - weight.exponent / 2;
  return static_cast<double>(weight.mantissa) * power *
         bits_to_double(static_cast<uint64_t>(rest + 1023) << 52);
}
FASTIS_HD inline bool usable_weight(int64_t weight) { return weight >= 0; }
template <class Number>
FASTIS_HD inline bool usable_weight(const Number& weight) {
  return weight.finite && !weight.negative;
}

FASTIS_HD inline Reduction reduce(const TiledWeights& weights, int64_t quad) {
  Reduction found;
  weights.each(quad, [&](const auto& weight, int) {
    const bool usable = usable_weight(weight);
    const double value = usable ? value_of(weight) : 0.0;
    found = found + Reduction{value, value, usable ? 0 : 1};
  });
  return found;
}

// Zeros stand for what lies beyond the last weight.
FASTIS_HD inline uint64_t sum_of(const Quad& quad) {
  return (quad.weight[0] + quad.weight[1]) + (quad.weight[2] + quad.weight[3]);
}

// The item at point x, and its weight. A step of the binary search and one of the walk through the
// tile are one access each.
FASTIS_HD inline int64_t inverse_cdf(const TiledWeights& weights, uint64_t x, uint64_t& weight) {
  const uint64_t* const prefix = weights.prefix;
  int64_t low = 0;
  for (int64_t length = weights.tiles(); length > 1;) {
    const int64_t half = length / 2;
    low += prefix[low + half - 1] <= x ? half : 0;
    length -= half;
  }
  x -= low > 0 ? prefix[low - 1] : 0;
  for (int64_t q = low * kQuads;; ++q) {
    const Quad quad = weights.read(q);
    const uint64_t sum = sum_of(quad);
    if (x >= sum) {
      x -= sum;
      continue;
    }
    const uint64_t second = quad.weight[0], third = second + quad.weight[1];
    const int j = (x >= second) + (x >= third) + (x >= third + quad.weight[2]);
    weight = quad.at(j);
    return q * kQuad + j;
  }
}

// One of the integers below `total` that a stretch of the stream gives.
FASTIS_HD inline uint64_t random_below(const Draws& draws, int64_t b, uint64_t total) {
  const uint64_t number = draws.first + static_cast<uint64_t>(b);
  return scale(random128(draws.seed, Stream::weights, 0, number), total);
}

FASTIS_HD inline void categorical_draw(const TiledWeights& weights, const Draws& draws, int64_t b,
                                       const Batch& batch) {
  uint64_t weight = 0;
  batch.indices[b] = inverse_cdf(weights, random_below(draws, b, weights.total), weight);
  batch.weights[b] =
      coefficient_of(static_cast<double>(weights.total), static_cast<double>(weights.n), weight);
}

}  // namespace fastis::device
