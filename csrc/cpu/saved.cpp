// Copying a table's states for saving and loading, and checking loaded ones.
#include <cmath>
#include <cstring>

#include "fastis.h"

namespace fastis::FASTIS_ISA {
namespace {

// What an update can write, with a factor of 2 to spare: of scores below kLargestScore, and of
// weights of which 2^32 can be drawn from.
constexpr float kMostMean = 2 * kLargestScore;
constexpr float kMostVar = 8 * kLargestScore * kLargestScore;
constexpr int kMostShift = 46;

constexpr int kBlock = 64;

struct Block {
  float mean[kBlock], var[kBlock];
  int32_t last[kBlock];
  uint32_t code[kBlock], least[kBlock];  // least: the code of the importance, before any floor
  int32_t good[kBlock];
};

void gather(const State* states, int size, Importance kind, Block& block) {
  for (int at = 0; at < size; ++at) {
    block.mean[at] = states[at].mean;
    block.var[at] = states[at].var;
    block.last[at] = states[at].last;
    block.code[at] = states[at].code;
  }
  for (int at = 0; at < size; ++at) {
    block.least[at] = code_of(importance_of(block.mean[at], block.var[at], kind), 0);
  }
}

// Comparisons that are false for NaN, and no branches: compiled to vectors.
bool all_good(int size, int32_t latest, int exponent, Block& block) {
  int32_t all = 1;
  for (int at = 0; at < size; ++at) {
    const float mean = block.mean[at], var = block.var[at];
    const uint32_t code = block.code[at];
    const int32_t last = block.last[at], shift = exponent_of(code) - exponent;
    const int32_t blank = ((last == kUnseen) | (last == kExcluded)) & (float_to_bits(mean) == 0) &
                          (float_to_bits(var) == 0);
    const int32_t observed = (last >= 0) & (last <= latest) & (std::fabs(mean) <= kMostMean) &
                             (var >= 0) & (var <= kMostVar) & (shift >= 0) & (shift <= kMostShift);
    const int32_t coded = ((code & 0x800000FFu) == 0) & (code >= block.least[at]);
    block.good[at] = (blank & (code == 0)) | (observed & coded);
    all &= block.good[at];
  }
  return all;
}

}  // namespace

void copy_state(int64_t num_scalars, int64_t num_states, const Durable& from, const Durable& to) {
  std::memcpy(to.scalars, from.scalars, num_scalars * sizeof(int64_t));
  *to.variance.address = *from.variance.address;
  for (int64_t i = 0; i < num_states; ++i) {
    State state = from.states[i];
    state.code &= ~kCappedFlag;
    to.states[i] = state;
  }
}

int64_t check_states(Pointer<const State> states, int64_t n, int64_t updates, int exponent,
                     Importance importance, Pointer<int64_t> found) {
  // A refresh is of the present iteration. The clock in a state is modulo 2^31: from then on it can
  // have every value.
  const auto latest = static_cast<int32_t>(updates > INT32_MAX ? INT32_MAX : updates);
  int64_t seen = 0, excluded = 0;
  unsigned __int128 total = 0;
  Block block;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int size = static_cast<int>(n - begin < kBlock ? n - begin : kBlock);
    gather(states + begin, size, importance, block);
    if (!all_good(size, latest, exponent, block)) {
      for (int at = 0;; ++at) {
        if (!block.good[at]) return begin + at;
      }
    }
    uint64_t low = 0, high = 0;
    for (int at = 0; at < size; ++at) {
      const uint32_t code = block.code[at];
      const uint64_t weight = mantissa_of(code) << ((exponent_of(code) - exponent) & 63);
      const uint64_t counted = code == 0 ? 0 : weight;
      low += counted & 0xFFFFFFFFu;
      high += counted >> 32;
      seen += code != 0;
      excluded += block.last[at] == kExcluded;
    }
    total += (static_cast<unsigned __int128>(high) << 32) + low;
  }
  found[0] = seen;
  found[1] = total >> 63 == 0 ? static_cast<int64_t>(total) : -1;
  found[2] = excluded;
  return -1;
}

}  // namespace fastis::FASTIS_ISA
