// A saved gradient times the incoming one, for one thread's share: out = grad * scale, in packs of
// 16 bytes of the gradient. The host does not know the scale; in place, a scale of 1 means that
// there is nothing to do.
#pragma once

#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "device/threads.h"
#include "fastis.h"

namespace fastis::device {

struct BrainBits {
  uint16_t bits;
};
struct HalfBits {
  uint16_t bits;
};

FASTIS_HD inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

FASTIS_HD inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// To and from the format in which the product is formed: float64 for float64, else float32.
FASTIS_HD inline float widened(float x) { return x; }
FASTIS_HD inline double widened(double x) { return x; }
FASTIS_HD inline float widened(BrainBits x) { return float_of(uint32_t{x.bits} << 16); }
FASTIS_HD inline void narrow(float x, float& out) { out = x; }
FASTIS_HD inline void narrow(double x, double& out) { out = x; }
FASTIS_HD inline void narrow(float x, BrainBits& out) {
#ifdef __CUDA_ARCH__
  out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  const uint32_t bits = bits_of(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
  out.bits = static_cast<uint16_t>(nan ? 0x7fffu : rounded >> 16);
#endif
}
FASTIS_HD inline void narrow(float x, HalfBits& out) {
#ifdef __CUDA_ARCH__
  out.bits = __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7fffu;
  } else if (magnitude >= 0x477ff000u) {  // 65520: the first that rounds beyond the largest
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // 2^-14: subnormal; adding 0.5 rounds to multiples 2^-24
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | half);
#endif
}

template <class T, int n>
struct alignas(sizeof(T) * n) Pack {
  T x[n];
};

// `In` and `Out` the formats of the gradient before and after.
template <class In, class Out>
struct Scaling {
  using Wide = decltype(widened(In{}));
  static constexpr int kPack = 16 / sizeof(In);

  const In* grad;  // [rows, columns]
  Out* out;        // the same; grad itself when in place
  const Wide* scale;
  int64_t rows, columns, scale_stride;  // in numbers
  bool in_place;

  FASTIS_HD int64_t size() const { return rows * columns; }
  FASTIS_HD int64_t packs() const { return size() / kPack + (size() % kPack != 0); }

  FASTIS_HD bool nothing_to_do() const { return in_place && rows == 1 && *scale == Wide{1}; }

  FASTIS_HD bool aligned() const {
    return reinterpret_cast<uintptr_t>(grad) % sizeof(Pack<In, kPack>) == 0 &&
           reinterpret_cast<uintptr_t>(out) % sizeof(Pack<Out, kPack>) == 0;
  }

  FASTIS_HD void operator()(int64_t pack) const {
    const int64_t first = pack * kPack, left = size() - first;
    int64_t row = rows == 1 ? 0 : first / columns, next = (row + 1) * columns - first;
    Wide by = scale[row * scale_stride];
    if (left >= kPack && next >= kPack && aligned()) {
      const auto before = *reinterpret_cast<const Pack<In, kPack>*>(grad + first);
      Pack<Out, kPack> after;
      for (int j = 0; j < kPack; ++j) narrow(widened(before.x[j]) * by, after.x[j]);
      *reinterpret_cast<Pack<Out, kPack>*>(out + first) = after;
      return;
    }
#ifdef __CUDACC__
#pragma unroll 1
#endif
    for (int j = 0; j < kPack && j < left; ++j) {
      if (j == next) {
        by = scale[++row * scale_stride];
        next += columns;
      }
      narrow(widened(grad[first + j]) * by, out[first + j]);
    }
  }
};

template <class In, class Out>
Scaling<In, Out> scaling_of(const ScaleGrad& call) {
  using Wide = typename Scaling<In, Out>::Wide;
  return {static_cast<const In*>(call.grad.address),
          static_cast<Out*>(call.out.address),
          static_cast<const Wide*>(call.scale.address),
          call.rows,
          call.columns,
          call.scale_stride,
          call.grad.address == call.out.address};
}

// run(Scaling<In, Out>) for the formats that a gradient has: its own, or float32 for float16.
template <class Run>
int64_t with_formats(const ScaleGrad& call, const Run& run) {
  if (call.from == fastis::Format::float32 && call.to == fastis::Format::float16) {
    return run(scaling_of<float, HalfBits>(call));
  }
  switch (call.from) {
    case fastis::Format::float32:
      return run(scaling_of<float, float>(call));
    case fastis::Format::float64:
      return run(scaling_of<double, double>(call));
    default:
      return run(scaling_of<BrainBits, BrainBits>(call));
  }
}

}  // namespace fastis::device
