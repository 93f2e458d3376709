// Exact quotients. A 64-bit division is a call of about a hundred instructions on a GPU; there it
// is one division of doubles for a divisor, and two products for a dividend.
#pragma once

#include <cstdint>

#include "philox.h"

namespace fastis {

struct Divisor {
  uint64_t value = 1;
  double inverse = 1;

  Divisor() = default;
  FASTIS_HD explicit Divisor(uint64_t divisor)
      : value(divisor), inverse(1.0 / static_cast<double>(divisor)) {}

  // floor(x / value) for x < 2^63 and 0 < value <= 2^62.
  FASTIS_HD uint64_t divide(uint64_t x) const {
#ifdef __CUDA_ARCH__
    // The first estimate is off by at most 2^-51 of itself, so what remains of x is small or less
    // than two divisors, and the second is off by at most one.
    uint64_t quotient = static_cast<uint64_t>(static_cast<double>(x) * inverse);
    const double remaining = static_cast<double>(static_cast<int64_t>(x - quotient * value));
    quotient += static_cast<uint64_t>(static_cast<int64_t>(remaining * inverse));
    const int64_t rest = static_cast<int64_t>(x - quotient * value);
    return quotient + (rest >= static_cast<int64_t>(value)) - (rest < 0);
#else
    return x / value;
#endif
  }
};

}  // namespace fastis
