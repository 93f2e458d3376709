// Random points for a run of draws: Philox on as many draws at once as the machine has lanes.
// Bit for bit what random128() and scale() of philox.h give one by one.
#pragma once

#include "cpu/simd.h"
#include "philox.h"

namespace fastis::FASTIS_ISA {

// One 32-bit word a lane, in its low half; the high halves hold rubbish that nothing reads.
typedef uint64_t Words __attribute__((vector_size(FASTIS_VECTOR_BYTES)));
constexpr int kWords = FASTIS_VECTOR_BYTES / 8;

inline Words multiply_words(Words a, Words b) {
#if defined(__AVX512F__) && FASTIS_VECTOR_BYTES == 64
  return reinterpret_cast<Words>(_mm512_mul_epu32((__m512i)a, (__m512i)b));
#elif defined(__AVX2__) && FASTIS_VECTOR_BYTES == 32
  return reinterpret_cast<Words>(_mm256_mul_epu32((__m256i)a, (__m256i)b));
#else
  constexpr uint64_t kLow = 0xFFFFFFFFu;
  return (a & kLow) * (b & kLow);
#endif
}

// take(b, R_b) for the 128 bits of each of the `count` draws from number `first` on, in order.
template <class Take>
inline void random_words(uint64_t seed, Stream stream, uint64_t iteration, uint64_t first,
                         int64_t count, const Take& take) {
  constexpr int kAbreast = 2;  // vectors, so that one's products run while the other's wait
  constexpr int kStep = kAbreast * kWords;
  const auto splat_word = [](uint64_t word) { return Words{} + word; };
  Words lanes{};
  for (int j = 0; j < kWords; ++j) lanes[j] = static_cast<uint64_t>(j);
  const Words m0 = splat_word(0xD2511F53u), m1 = splat_word(0xCD9E8D57u);
  for (int64_t done = 0; done < count; done += kStep) {
    Words c0[kAbreast], c1[kAbreast], c2[kAbreast], c3[kAbreast];
    for (int v = 0; v < kAbreast; ++v) {
      c0[v] = splat_word(first + static_cast<uint64_t>(done + v * kWords)) + lanes;
      c1[v] = (c0[v] >> 32) | splat_word(uint64_t{static_cast<uint32_t>(stream)} << 24);
      c2[v] = splat_word(iteration);
      c3[v] = splat_word(iteration >> 32);
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      for (int v = 0; v < kAbreast; ++v) {
        const Words p0 = multiply_words(m0, c0[v]), p1 = multiply_words(m1, c2[v]);
        c0[v] = (p1 >> 32) ^ c1[v] ^ splat_word(k0);
        c2[v] = (p0 >> 32) ^ c3[v] ^ splat_word(k1);
        c1[v] = p1;
        c3[v] = p0;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    constexpr uint64_t kLow = 0xFFFFFFFFu;
    uint64_t lo[kStep], hi[kStep];
    for (int v = 0; v < kAbreast; ++v) {
      store_as(lo + v * kWords, (c0[v] & kLow) | (c1[v] << 32));
      store_as(hi + v * kWords, (c2[v] & kLow) | (c3[v] << 32));
    }
    const int size = count - done < kStep ? static_cast<int>(count - done) : kStep;
    for (int j = 0; j < size; ++j) take(done + j, Random128{lo[j], hi[j]});
  }
}

// points[b] = floor(R_b total / 2^128) of the `count` draws from number `first` on.
inline void random_points(uint64_t seed, Stream stream, uint64_t iteration, uint64_t first,
                          int64_t count, uint64_t total, uint64_t* points) {
  random_words(seed, stream, iteration, first, count,
               [=](int64_t b, Random128 r) { points[b] = scale(r, total); });
}

}  // namespace fastis::FASTIS_ISA
