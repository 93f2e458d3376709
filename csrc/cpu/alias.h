// The alias table (Walker 1977) in integers, 16 bytes an item.
// N buckets share the total T: the first T mod N hold floor(T/N) + 1 units, the others floor(T/N).
// Bucket i gives its first `own` units to item i and the rest to item `alias`; added up over all
// buckets, an item has exactly its integer weight. Both numbers fit one word for any N, since their
// bits make up those of T; beside it lie the coefficients of the two items, so that a draw is one
// random access.
#pragma once

#include "cpu/integers.h"

namespace fastis::FASTIS_ISA {

struct Bucket {
  uint64_t word;         // own << bits | alias
  float coefficient[2];  // r = T / (N W) of the item itself and of its alias
};
static_assert(sizeof(Bucket) == 16);

struct Buckets {
  uint64_t capacity, larger;  // floor(T/N); how many buckets hold one unit more
  int bits;                   // of an index

  Buckets(uint64_t total, uint64_t n) : capacity(total / n), larger(total % n), bits(0) {
    while (bits < 63 && (uint64_t{1} << bits) < n) ++bits;
  }
  uint64_t operator[](uint64_t bucket) const { return capacity + (bucket < larger); }
};

}  // namespace fastis::FASTIS_ISA
