// The sampling structure on the CPU: a radix-16 tree of integer sums over the records, with the
// items above the flattening cap ("heavy", at most ceil(B/D) - 1 of them) kept outside in a list.
// Bytes a sample: 16 for the record, 16/15 x (8 + 4 + 4)/16 = 1.07 for sums, counts and peaks.
// Bytes touched: an update 128 + 4 (+ 64 for a new sample) a level, a draw 128 a level.
#pragma once

#include "table.h"

namespace fastis::FASTIS_ISA {

// Recomputes codes, e0 and totals from the state, with the floor at the present mean. O(N).
void rescale(const Table& table);

// Fills sums, counts and peaks from the codes; the heavy list is empty afterwards. O(N).
void rebuild(const Table& table);

// Brings the heavy list, theta and the weight of unseen items up to date: O((changes) log N).
void settle(const Table& table);

// Adds `delta` (modulo 2^64) to the sums above record `index`.
void add_to_sums(const Table& table, int64_t index, uint64_t delta);

// One unseen item less above record `index`.
void count_seen(const Table& table, int64_t index);

// Makes the peaks above record `index` right again after its code (0: not light) changed.
void refresh_peaks(const Table& table, int64_t index, uint32_t old_code, uint32_t new_code);

}  // namespace fastis::FASTIS_ISA
