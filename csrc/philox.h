// Counter-based random numbers (Philox4x32-10, Salmon et al. 2011) and the keyed permutation of the
// epochs without replacement. Shared by host and device: one truth, tested on the CPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTIS_HD __host__ __device__
#else
#define FASTIS_HD
#endif

namespace fastis {

// What a counter is used for; part of the counter, so that two uses never share a block.
enum class Stream : uint32_t { draw = 0, permutation = 1, weights = 2 };

struct Random128 {
  uint64_t lo, hi;
};

// floor(a b / 2^64)
FASTIS_HD inline uint64_t mulhi(uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH__
  return __umul64hi(a, b);
#else
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
#endif
}

FASTIS_HD inline void philox4x32_10(uint32_t c[4], uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c[0], p1 = uint64_t{0xCD9E8D57u} * c[2];
    const uint32_t c0 = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0;
    const uint32_t c2 = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1;
    c[0] = c0;
    c[1] = static_cast<uint32_t>(p1);
    c[2] = c2;
    c[3] = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// The 128 bits of draw `position` (below 2^56) of iteration `iteration`.
FASTIS_HD inline Random128 random128(uint64_t seed, Stream stream, uint64_t iteration,
                                     uint64_t position) {
  uint32_t c[4] = {static_cast<uint32_t>(position),
                   static_cast<uint32_t>(position >> 32) | (static_cast<uint32_t>(stream) << 24),
                   static_cast<uint32_t>(iteration), static_cast<uint32_t>(iteration >> 32)};
  philox4x32_10(c, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  return {c[0] | (uint64_t{c[1]} << 32), c[2] | (uint64_t{c[3]} << 32)};
}

// floor(R total / 2^128): every value below `total` has probability 1/total to within 2^-66.
FASTIS_HD inline uint64_t scale(Random128 r, uint64_t total) {
  const uint64_t carry_in = mulhi(r.lo, total), low = r.hi * total;
  return mulhi(r.hi, total) + (low + carry_in < low ? 1 : 0);
}

// A bijection of [0, n) keyed by (seed, epoch): a balanced Feistel network on the next even number
// of bits, walked along its cycle until the value falls below n. No memory, no shuffle.
class Permutation {
 public:
  FASTIS_HD Permutation(uint64_t seed, uint64_t epoch, uint64_t n) : n_(n) {
    while (half_bits_ < 32 && (uint64_t{1} << (2 * half_bits_)) < n) ++half_bits_;
    mask_ = static_cast<uint32_t>((uint64_t{1} << half_bits_) - 1);
    for (int block = 0; block < kRounds / 4; ++block) {
      const Random128 r = random128(seed, Stream::permutation, epoch, block);
      key_[4 * block] = static_cast<uint32_t>(r.lo);
      key_[4 * block + 1] = static_cast<uint32_t>(r.lo >> 32);
      key_[4 * block + 2] = static_cast<uint32_t>(r.hi);
      key_[4 * block + 3] = static_cast<uint32_t>(r.hi >> 32);
    }
  }

  FASTIS_HD uint64_t operator()(uint64_t position) const {
    do {
      position = once(position);
    } while (position >= n_);
    return position;
  }

 private:
  static constexpr int kRounds = 8;

  FASTIS_HD uint64_t once(uint64_t x) const {
    uint32_t left = static_cast<uint32_t>(x >> half_bits_),
             right = static_cast<uint32_t>(x) & mask_;
    for (int round = 0; round < kRounds; ++round) {
      uint32_t v = right + key_[round];
      v = (v ^ (v >> 16)) * 0x85EBCA6Bu;
      v = (v ^ (v >> 13)) * 0xC2B2AE35u;
      v = (v ^ (v >> 16)) & mask_;
      const uint32_t next = left ^ v;
      left = right;
      right = next;
    }
    return (uint64_t{left} << half_bits_) | right;
  }

  uint64_t n_;
  int half_bits_ = 1;
  uint32_t mask_;
  uint32_t key_[kRounds];
};

}  // namespace fastis
