// Vectors of one instruction set by GCC/Clang vector extensions: one source for every width.
// Everything is in the namespace of its instruction set and nothing inline comes from std: the
// linker merges equal inline functions, and must never hand AVX code to the baseline.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "fastis.h"

#if defined(__AVX2__)
// GCC 12 warns of its own AVX-512 intrinsics.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

// -DFASTIS_VECTOR_BYTES=64 compiles the 16-lane code for a narrower machine, to test it there.
#ifndef FASTIS_VECTOR_BYTES
#if defined(__AVX512F__)
#define FASTIS_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FASTIS_VECTOR_BYTES 32
#else
#define FASTIS_VECTOR_BYTES 16
#endif
#endif

namespace fastis::FASTIS_ISA {

// Storage formats that have no C++ type.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class F>
struct Simd;
template <>
struct Simd<float> {
  using Int = int32_t;
  typedef float Vector __attribute__((vector_size(FASTIS_VECTOR_BYTES)));
  typedef int32_t Mask __attribute__((vector_size(FASTIS_VECTOR_BYTES)));
  typedef uint32_t Bits __attribute__((vector_size(FASTIS_VECTOR_BYTES)));
  typedef uint16_t Narrow __attribute__((vector_size(FASTIS_VECTOR_BYTES / 2)));
};
template <>
struct Simd<double> {
  using Int = int64_t;
  typedef double Vector __attribute__((vector_size(FASTIS_VECTOR_BYTES)));
  typedef int64_t Mask __attribute__((vector_size(FASTIS_VECTOR_BYTES)));
};
template <class F>
using Vec = typename Simd<F>::Vector;
template <class F>
using Mask = typename Simd<F>::Mask;
template <class F>
constexpr int kLanes = FASTIS_VECTOR_BYTES / sizeof(F);

// Arithmetic and gradient types of a storage format. Float16 gradients stay float until the
// backward has multiplied them by the loss scale: at 1/B they would underflow before it.
template <class S>
struct Precision {
  using Compute = float;
  using Grad = float;
};
template <>
struct Precision<double> {
  using Compute = double;
  using Grad = double;
};
template <>
struct Precision<BFloat16> {
  using Compute = float;
  using Grad = BFloat16;
};
template <class S>
using Compute = typename Precision<S>::Compute;
template <class S>
using Grad = typename Precision<S>::Grad;

// run(S{}) with the C++ type of a floating format.
template <class Run>
inline auto with_format(Format format, const Run& run) {
  switch (format) {
    case Format::float32:
      return run(float{});
    case Format::float64:
      return run(double{});
    case Format::bfloat16:
      return run(BFloat16{});
    default:
      return run(Float16{});
  }
}

// A vector at any address. GCC copies through the stack what a loop of memcpy moves.
template <class V, class S>
inline V load_as(const S* p) {
  typedef V Unaligned __attribute__((aligned(1), may_alias));
  return *reinterpret_cast<const Unaligned*>(p);
}
template <class V, class S>
inline void store_as(S* p, V x) {
  typedef V Unaligned __attribute__((aligned(1), may_alias));
  *reinterpret_cast<Unaligned*>(p) = x;
}

template <class F>
inline Vec<F> splat(F x) {
  return Vec<F>{} + x;
}

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class F>
inline Vec<F> select(Mask<F> mask, Vec<F> yes, Vec<F> no) {
  return mask ? yes : no;
}

// 0, 1, 2, ...
template <class F>
inline Mask<F> iota() {
  Mask<F> lanes;
  for (int i = 0; i < kLanes<F>; ++i) lanes[i] = i;
  return lanes;
}

// a > b ? a : b, thus b where either is NaN.
template <class F>
inline Vec<F> max(Vec<F> a, Vec<F> b) {
#if defined(__AVX512F__) && FASTIS_VECTOR_BYTES == 64
  if constexpr (sizeof(F) == 4) {
    return _mm512_max_ps(a, b);
  } else {
    return _mm512_max_pd(a, b);
  }
#elif defined(__AVX2__) && FASTIS_VECTOR_BYTES == 32
  if constexpr (sizeof(F) == 4) {
    return _mm256_max_ps(a, b);
  } else {
    return _mm256_max_pd(a, b);
  }
#else
  return select<F>(a > b, a, b);
#endif
}

// a < b ? a : b, thus b where either is NaN.
template <class F>
inline Vec<F> min(Vec<F> a, Vec<F> b) {
#if defined(__AVX512F__) && FASTIS_VECTOR_BYTES == 64
  if constexpr (sizeof(F) == 4) {
    return _mm512_min_ps(a, b);
  } else {
    return _mm512_min_pd(a, b);
  }
#elif defined(__AVX2__) && FASTIS_VECTOR_BYTES == 32
  if constexpr (sizeof(F) == 4) {
    return _mm256_min_ps(a, b);
  } else {
    return _mm256_min_pd(a, b);
  }
#else
  return select<F>(a < b, a, b);
#endif
}

// a * b + c, rounded once where the machine can.
template <class F>
inline Vec<F> fma(Vec<F> a, Vec<F> b, Vec<F> c) {
#if defined(__AVX512F__) && FASTIS_VECTOR_BYTES == 64
  if constexpr (sizeof(F) == 4) return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__) && FASTIS_VECTOR_BYTES == 32
  if constexpr (sizeof(F) == 4) return _mm256_fmadd_ps(a, b, c);
#endif
  return a * b + c;
}

template <class F>
inline Vec<F> sqrt(Vec<F> x) {
#if defined(__AVX512F__) && FASTIS_VECTOR_BYTES == 64
  if constexpr (sizeof(F) == 4) return _mm512_sqrt_ps(x);
#elif defined(__AVX2__) && FASTIS_VECTOR_BYTES == 32
  if constexpr (sizeof(F) == 4) return _mm256_sqrt_ps(x);
#endif
  for (int i = 0; i < kLanes<F>; ++i) {
    if constexpr (sizeof(F) == 4) {
      x[i] = __builtin_sqrtf(x[i]);
    } else {
      x[i] = __builtin_sqrt(x[i]);
    }
  }
  return x;
}

template <class F>
inline F reduce_max(Vec<F> x) {
  F best = x[0];
  for (int i = 1; i < kLanes<F>; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

template <class F>
inline F reduce_add(Vec<F> x) {
  F sum = x[0];
  for (int i = 1; i < kLanes<F>; ++i) sum += x[i];
  return sum;
}

inline Vec<float> load(const float* p) { return load_as<Vec<float>>(p); }
inline Vec<double> load(const double* p) { return load_as<Vec<double>>(p); }

inline Vec<float> load(const BFloat16* p) {
  const auto narrow = load_as<Simd<float>::Narrow>(p);
  return bit_cast<Vec<float>>(__builtin_convertvector(narrow, Simd<float>::Bits) << 16);
}

inline Vec<float> load(const Float16* p) {
  const auto narrow = load_as<Simd<float>::Narrow>(p);
  const auto half = __builtin_convertvector(narrow, Simd<float>::Bits);
  const auto magnitude = half & 0x7fffu;
  // Shifted into a float the exponent is 112 too small, for subnormals too; one product mends it.
  const auto scaled = bit_cast<Vec<float>>(magnitude << 13) * 0x1p112f;
  const auto not_finite = bit_cast<Simd<float>::Bits>(magnitude >= 0x7c00u) & 0x7f800000u;
  return bit_cast<Vec<float>>(bit_cast<Simd<float>::Bits>(scaled) | not_finite |
                              (half & 0x8000u) << 16);
}

inline void store(float* p, Vec<float> x) { store_as(p, x); }
inline void store(double* p, Vec<double> x) { store_as(p, x); }

// Round half to even; a NaN stays one.
inline void store(BFloat16* p, Vec<float> x) {
  const auto bits = bit_cast<Simd<float>::Bits>(x);
  const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const auto is_nan = bit_cast<Simd<float>::Bits>(x != x);
  const auto narrow =
      __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0u), Simd<float>::Narrow);
  store_as(p, narrow);
}

// The first count lanes from memory, the others `fill`.
template <class S>
inline Vec<Compute<S>> load_some(const S* p, int count, Compute<S> fill) {
  using F = Compute<S>;
  S buffer[kLanes<F>] = {};
  for (int i = 0; i < count; ++i) buffer[i] = p[i];
  return select<F>(iota<F>() < typename Simd<F>::Int(count), load(buffer), splat<F>(fill));
}

template <class S, class V>
inline void store_some(S* p, V x, int count) {
  S buffer[sizeof(V) / sizeof(x[0])];
  store(buffer, x);
  for (int i = 0; i < count; ++i) p[i] = buffer[i];
}

#if defined(__AVX512F__) && FASTIS_VECTOR_BYTES == 64
inline Vec<float> load_some(const float* p, int count, float fill) {
  return _mm512_mask_loadu_ps(splat(fill), static_cast<__mmask16>((1u << count) - 1), p);
}
inline void store_some(float* p, Vec<float> x, int count) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), x);
}
#elif defined(__AVX2__) && FASTIS_VECTOR_BYTES == 32
inline Vec<float> load_some(const float* p, int count, float fill) {
  const auto mask = iota<float>() < count;
  return select<float>(mask, _mm256_maskload_ps(p, (__m256i)mask), splat(fill));
}
inline void store_some(float* p, Vec<float> x, int count) {
  _mm256_maskstore_ps(p, (__m256i)(iota<float>() < count), x);
}
#endif

// Memory of a call, freed when it returns; null for a count of 0. Must be made before a parallel
// region, not in it: an exception can't leave one.
template <class F>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    if (count == 0) return;
    data_ = static_cast<F*>(std::malloc(static_cast<size_t>(count) * sizeof(F)));
    if (data_ == nullptr) out_of_memory();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator F*() const { return data_; }

 private:
  F* data_ = nullptr;
};

}  // namespace fastis::FASTIS_ISA
