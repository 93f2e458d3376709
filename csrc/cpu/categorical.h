// Integer weights from floats, a vector at a time. Bit for bit what fastis/kernels/quantize.py
// gives: a float is a mantissa times a power of two, so floor(w 2^shift) is a shift of the
// mantissa.
#pragma once

#include "cpu/random.h"
#include "integer_weights.h"

namespace fastis::FASTIS_ISA {

// Of a format's mantissa, the leading one included.
template <class S>
constexpr int kDigits = 24;
template <>
constexpr int kDigits<double> = 53;
template <>
constexpr int kDigits<BFloat16> = 8;
template <>
constexpr int kDigits<Float16> = 11;

// Counts from 64 on give 0.
inline Words shift_left(Words x, Words count) {
#if defined(__AVX512F__) && FASTIS_VECTOR_BYTES == 64
  return reinterpret_cast<Words>(_mm512_sllv_epi64((__m512i)x, (__m512i)count));
#elif defined(__AVX2__) && FASTIS_VECTOR_BYTES == 32
  return reinterpret_cast<Words>(_mm256_sllv_epi64((__m256i)x, (__m256i)count));
#else
  for (int j = 0; j < kWords; ++j) x[j] = count[j] < 64 ? x[j] << count[j] : 0;
  return x;
#endif
}

inline Words shift_right(Words x, Words count) {
#if defined(__AVX512F__) && FASTIS_VECTOR_BYTES == 64
  return reinterpret_cast<Words>(_mm512_srlv_epi64((__m512i)x, (__m512i)count));
#elif defined(__AVX2__) && FASTIS_VECTOR_BYTES == 32
  return reinterpret_cast<Words>(_mm256_srlv_epi64((__m256i)x, (__m256i)count));
#else
  for (int j = 0; j < kWords; ++j) x[j] = count[j] < 64 ? x[j] >> count[j] : 0;
  return x;
#endif
}

inline Words where(Mask<double> mask, Words yes) { return bit_cast<Words>(mask) & yes; }

// w finite and not negative. kSubnormal: some may be below 2^-1022 (floats in doubles never are).
template <bool kSubnormal>
inline Words to_integer_weights(Vec<double> w, int shift) {
  constexpr uint64_t kImplicit = uint64_t{1} << 52;
  const Words zero{};
  const Words bits = bit_cast<Words>(w) & ~(uint64_t{1} << 63);  // -0 is 0
  Words exponent = bits >> 52, mantissa = bits & (kImplicit - 1);
  if constexpr (kSubnormal) {
    mantissa |= where(exponent != zero, zero + kImplicit);
    exponent += where(exponent == zero, zero + 1);
  } else {
    mantissa |= kImplicit;  // of 0 too, which is then shifted out
  }
  const Words left = exponent + static_cast<uint64_t>(int64_t{shift} - 1075);
  const Words integer = shift_left(mantissa, left) | shift_right(mantissa, zero - left);
  // 1 more where they are 0 and w is not; a mask is -1.
  return integer - bit_cast<Words>(integer == zero) + bit_cast<Words>(bits == zero);
}

// The exact value rounded once; x below 2^63.
inline Vec<double> to_double(Words x) {
  constexpr uint64_t kLow = 0xFFFFFFFFu;
  const auto low = bit_cast<Vec<double>>((x & kLow) | 0x4330000000000000u);  // 2^52 + low half
  const auto high = bit_cast<Vec<double>>((x >> 32) | 0x4530000000000000u);  // 2^84 + high half
  return (high - 0x1.00000001p84) + low;
}

// Half as many floats as a vector has. (GCC converts them in quarters where left to itself.)
typedef float HalfFloats __attribute__((vector_size(FASTIS_VECTOR_BYTES / 2)));

inline Vec<double> widen(HalfFloats x) {
#if defined(__AVX512F__) && FASTIS_VECTOR_BYTES == 64
  return _mm512_cvtps_pd((__m256)x);
#elif defined(__AVX2__) && FASTIS_VECTOR_BYTES == 32
  return _mm256_cvtps_pd((__m128)x);
#else
  return __builtin_convertvector(x, Vec<double>);
#endif
}

inline HalfFloats narrow(Vec<double> x) {
#if defined(__AVX512F__) && FASTIS_VECTOR_BYTES == 64
  return (HalfFloats)_mm512_cvtpd_ps((__m512d)x);
#elif defined(__AVX2__) && FASTIS_VECTOR_BYTES == 32
  return (HalfFloats)_mm256_cvtpd_ps((__m256d)x);
#else
  return __builtin_convertvector(x, HalfFloats);
#endif
}

// What one load of a format becomes, in doubles.
template <class F>
struct Doubles {
  Vec<double> part[2];
};
template <>
struct Doubles<double> {
  Vec<double> part[1];
};
inline Doubles<float> to_doubles(Vec<float> x) {
  struct Halves {
    HalfFloats part[2];
  };
  const auto halves = bit_cast<Halves>(x);
  return {{widen(halves.part[0]), widen(halves.part[1])}};
}
inline Doubles<double> to_doubles(Vec<double> x) { return {{x}}; }

// integer [count, rounded up to whole vectors of S] of `count` values.
template <class S>
inline void quantize_values(const S* values, int count, int shift, uint64_t* integer) {
  constexpr int kStep = kLanes<Compute<S>>;
  for (int i = 0; i < count; i += kStep) {
    const auto w =
        count - i < kStep ? load_some(values + i, count - i, Compute<S>(0)) : load(values + i);
    const auto doubles = to_doubles(w);
    int at = i;
    for (const Vec<double> part : doubles.part) {
      store_as(integer + at, to_integer_weights<kDigits<S> == 53>(part, shift));
      at += kWords;
    }
  }
}
inline void quantize_values(const int64_t* values, int count, int, uint64_t* integer) {
  std::memcpy(integer, values, sizeof(uint64_t) * count);
}

constexpr int kGroup = 64;  // integers to one of the prefix sums

// visit(values) with the values as they lie in memory.
template <class Visitor>
auto visit(const IntegerWeights& weights, const Visitor& visitor) {
  switch (weights.format) {
    case fastis::Format::float32:
      return visitor(static_cast<const float*>(weights.values.address));
    case fastis::Format::float64:
      return visitor(static_cast<const double*>(weights.values.address));
    case fastis::Format::bfloat16:
      return visitor(static_cast<const BFloat16*>(weights.values.address));
    case fastis::Format::float16:
      return visitor(static_cast<const Float16*>(weights.values.address));
    default:
      return visitor(static_cast<const int64_t*>(weights.values.address));
  }
}

// integer [count, rounded up to 16 of them]: those of items first, ..., first + count - 1.
inline void read(const IntegerWeights& weights, int64_t first, int count, uint64_t* integer) {
  visit(weights, [&](const auto* values) {
    quantize_values(values + first, count, weights.shift, integer);
  });
}

}  // namespace fastis::FASTIS_ISA
