// The draw: the next minibatch and its coefficients, found in the tree by points below the total,
// each of 128 random bits.
#include <algorithm>

#include "cpu/descent.h"
#include "cpu/random.h"
#include "cpu/tree.h"
#include "fastis.h"

namespace fastis::FASTIS_ISA {
namespace {

using Wide = unsigned __int128;

Wide wide(uint64_t low, uint64_t high) { return Wide{high} << 64 | low; }

// The distribution as it stands and its inverse CDF: from points below its total to items. Capped
// items fill [0, k theta), the others the rest, both in the order of their indices.
class Distribution {
 public:
  explicit Distribution(const Table& table) : t_(table) {
    update_cap(t_);
    read();
    for_coefficients_ = static_cast<double>(total_);
    num_samples_ = static_cast<double>(active(t_));
    theta_for_coefficients_ = static_cast<double>(theta_);
  }

  // Of a shard, as hold_theta() has left it.
  Distribution(const Table& table, const Share& share) : t_(table) {
    read();
    for_coefficients_ = static_cast<double>(wide(share.total_low, share.total_high));
    num_samples_ = share.num_samples;
    theta_for_coefficients_ = static_cast<double>(wide(share.theta_low, share.theta_high));
    unit_ = two_to(share.shift);
  }

  uint64_t total() const { return total_; }
  uint64_t capped_total() const { return capped_total_; }
  uint64_t theta() const { return theta_; }

  // The items that at most kBlock points fall into, and their coefficients. (Inlined into the loop
  // over blocks, the descents are 2 % slower.)
  __attribute__((noinline)) void find(const uint64_t* points, int size, const Batch& found) const {
    Descent capped, uncapped;
    for (int b = 0; b < size; ++b) {
      Descent& side = points[b] < capped_total_ ? capped : uncapped;
      side.position[side.size] = b;
      side.weight[side.size] = theta_;
      side.x[side.size++] =
          points[b] < capped_total_ ? points[b] / theta_ : points[b] - capped_total_;
    }
    if (t_.list_capacity > 0) {
      for (int b = 0; b < capped.size; ++b) capped.node[b] = t_.listed[capped.x[b]];
    } else if (capped.size > 0) {
      descend_capped(t_, capped);
    }
    switch (beside_) {
      case Beside::nothing:
        descend<Beside::nothing>(t_, uncapped);
        break;
      case Beside::unseen:
        descend<Beside::unseen>(t_, uncapped);
        break;
      case Beside::unseen_and_offset:
        descend<Beside::unseen_and_offset>(t_, uncapped);
        break;
      case Beside::alike:
        descend<Beside::alike>(t_, uncapped);
    }
    for (int b = 0; b < capped.size; ++b) {
      put(capped.position[b], capped.node[b], theta_for_coefficients_, found);
    }
    for (int b = 0; b < uncapped.size; ++b) {
      const double weight = static_cast<double>(uncapped.weight[b]) * unit_;
      put(uncapped.position[b], uncapped.node[b], weight, found);
    }
  }

 private:
  void read() {
    const Scalars& s = *t_.scalars;
    const int64_t items = active(t_), unseen = items - s.seen;
    theta_ = static_cast<uint64_t>(s.theta);
    if (s.offset < 0) {
      beside_ = Beside::alike;
      capped_total_ = 0;
      total_ = static_cast<uint64_t>(items);
      return;
    }
    beside_ = s.offset != 0 ? Beside::unseen_and_offset
              : unseen > 0  ? Beside::unseen
                            : Beside::nothing;
    capped_total_ = s.num_capped > 0 ? s.num_capped * theta_ : 0;
    total_ =
        capped_total_ + static_cast<uint64_t>(s.uncapped + unseen * s.unseen + items * s.offset);
  }

  // Coefficients are 1 / (N p), N being the active items.
  void put(int position, int64_t index, double weight, const Batch& found) const {
    found.indices[position] = index;
    found.weights[position] = static_cast<float>(for_coefficients_ / (num_samples_ * weight));
  }

  const Table& t_;
  Beside beside_;
  uint64_t total_, theta_, capped_total_;
  double for_coefficients_, num_samples_, theta_for_coefficients_;  // in units of the total
  double unit_ = 1;                                                 // of a shard's own weights
};

// The points of draws b, b + 1, ... below the total.
void place(const Table& t, uint64_t iteration, uint64_t total, int64_t first, int size,
           uint64_t* points) {
  if (t.scheme == Scheme::systematic) {
    random_points(t.seed, Stream::draw, iteration, 0, 1, total, points);
    std::fill_n(points + 1, size - 1, points[0]);
  } else {
    random_points(t.seed, Stream::draw, iteration, first, size, total, points);
  }
  if (t.scheme == Scheme::multinomial) return;
  for (int b = 0; b < size; ++b) {
    points[b] = slice_point(t, static_cast<uint64_t>(first + b), points[b], total);
  }
}

void draw_by_importance(const Table& t, uint64_t iteration, const Batch& batch) {
  const Distribution distribution(t);
  uint64_t points[kBlock];
  for (int64_t first = 0; first < t.batch_size; first += kBlock) {
    const int size = static_cast<int>(std::min<int64_t>(kBlock, t.batch_size - first));
    place(t, iteration, distribution.total(), first, size, points);
    distribution.find(points, size, {batch.indices + first, batch.weights + first});
  }
}

// In place: from numbers among the active items to their indices.
void find_active(const Table& t, int64_t* indices, int64_t count) {
  if (!t.scalars->valid) rebuild(t);
  Descent found;
  for (int64_t first = 0; first < count; first += kBlock) {
    found.size = static_cast<int>(std::min<int64_t>(kBlock, count - first));
    std::copy_n(indices + first, found.size, found.x);
    descend<Beside::alike>(t, found);
    std::copy_n(found.node, found.size, indices + first);
  }
}

void draw_without_replacement(const Table& t, int64_t iteration, const Batch& batch) {
  const InEpoch place(t, iteration);
  const int64_t items = active(t);
  const Permutation permutation(t.seed, place.epoch, items);
  if (items == t.num_samples) {
    for (int64_t b = 0; b < t.batch_size; ++b) batch.indices[b] = permutation(place.first + b);
    return;
  }
  for (int64_t b = 0; b < t.batch_size; ++b) {
    batch.indices[b] = permutation((place.first + b) % items);
  }
  find_active(t, batch.indices, t.batch_size);
}

// floor(R total / 2^128): scale() of philox.h for totals below 2^127.
Wide scale_wide(Random128 r, Wide total) {
  const uint64_t low = static_cast<uint64_t>(total), high = static_cast<uint64_t>(total >> 64);
  const Wide a = Wide{r.lo} * high, b = Wide{r.hi} * low;
  const Wide middle = Wide{static_cast<uint64_t>(a)} + static_cast<uint64_t>(b) +
                      static_cast<uint64_t>((Wide{r.lo} * low) >> 64);
  return Wide{r.hi} * high + (a >> 64) + (b >> 64) + (middle >> 64);
}

// A rank's draws among those of all shards, block by block.
class ShareOfDraws {
 public:
  ShareOfDraws(const Table& table, const Share& share, const Batch& batch)
      : t_(table),
        share_(share),
        batch_(batch),
        distribution_(table, share),
        total_(wide(share.total_low, share.total_high)),
        before_(wide(share.before_low, share.before_high)),
        own_(wide(share.own_low, share.own_high)),
        theta_(wide(share.theta_low, share.theta_high)),
        capped_(theta_ * static_cast<uint64_t>(capped_items())),
        quotient_(total_ / share.batch_size),
        remainder_(static_cast<uint64_t>(total_ % share.batch_size)) {}

  // How many are the rank's.
  int64_t find(uint64_t iteration) {
    if (t_.scheme == Scheme::systematic) {
      Wide offset = 0;
      random_words(share_.seed, Stream::draw, iteration, 0, 1,
                   [&](int64_t, Random128 r) { offset = scale_wide(r, total_); });
      for (int64_t b = 0; b < share_.count; ++b) take(slice_point(share_.first + b, offset));
    } else {
      const bool sliced = t_.scheme == Scheme::stratified;
      random_words(share_.seed, Stream::draw, iteration, share_.first, share_.count,
                   [&](int64_t b, Random128 r) {
                     const Wide point = scale_wide(r, total_);
                     take(sliced ? slice_point(share_.first + b, point) : point);
                   });
    }
    flush();
    return found_;
  }

 private:
  // Where nothing has been seen, all items weigh theta.
  int64_t capped_items() const { return all_alike() ? t_.num_samples : t_.scalars->num_capped; }
  bool all_alike() const { return t_.states == nullptr || t_.scalars->seen == 0; }

  Wide slice_point(int64_t b, Wide offset) const {
    const uint64_t at = static_cast<uint64_t>(b);
    return at * quotient_ + (Wide{at} * remainder_ + offset) / share_.batch_size;
  }

  void take(Wide point) {
    const Wide x = point - before_;  // wraps where it lies before
    if (x >= own_) return;
    if (x < capped_) {
      const auto item = static_cast<uint64_t>(x / theta_);
      points_[size_++] = all_alike() ? item : item * distribution_.theta();
    } else {
      points_[size_++] =
          distribution_.capped_total() + static_cast<uint64_t>((x - capped_) >> share_.shift);
    }
    if (size_ == kBlock) flush();
  }

  void flush() {
    const Batch found{batch_.indices + found_, batch_.weights + found_};
    if (all_alike()) {
      const double total = static_cast<double>(total_), theta = static_cast<double>(theta_);
      const auto weight = static_cast<float>(total / (share_.num_samples * theta));
      for (int b = 0; b < size_; ++b) {
        found.indices[b] = static_cast<int64_t>(points_[b]);
        found.weights[b] = weight;
      }
    } else if (size_ > 0) {
      distribution_.find(points_, size_, found);
    }
    found_ += size_;
    size_ = 0;
  }

  const Table& t_;
  const Share& share_;
  const Batch& batch_;
  const Distribution distribution_;
  const Wide total_, before_, own_, theta_, capped_, quotient_;
  const uint64_t remainder_;
  uint64_t points_[kBlock];
  int size_ = 0;
  int64_t found_ = 0;
};

}  // namespace

void shard_total(Pointer<const Table> table, uint64_t theta, Pointer<int64_t> found) {
  const Table& t = *table.address;
  const bool none = t.states == nullptr || t.scalars->seen == 0;
  if (!none) hold_theta(t, theta);
  const Scalars& s = *t.scalars;
  found[0] = none ? 0 : s.uncapped + (t.num_samples - s.seen) * s.unseen;
  found[1] = none ? t.num_samples : s.num_capped;
}

int64_t draw_share(Pointer<const Table> table, const Share& share, const Batch& batch) {
  const Table& t = *table.address;
  return ShareOfDraws(t, share, batch).find(static_cast<uint64_t>(t.scalars->draws++));
}

void draw(Pointer<const Table> table, const Batch& batch) {
  const Table& t = *table.address;
  if (active(t) == 0) all_are_excluded(t.num_samples);
  const int64_t iteration = t.scalars->draws++;
  if (without_replacement(t, iteration)) {
    draw_without_replacement(t, iteration, batch);
  } else if (t.states == nullptr) {
    random_points(t.seed, Stream::draw, iteration, 0, t.batch_size, t.num_samples,
                  reinterpret_cast<uint64_t*>(batch.indices.address));
  } else {
    return draw_by_importance(t, iteration, batch);
  }
  std::fill_n(batch.weights.address, t.batch_size, 1.0f);
}

}  // namespace fastis::FASTIS_ISA
