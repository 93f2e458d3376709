// The kernels of csrc/cuda/table.cu on threads, step by step beside HostGrid: equal draws, tables
// and trees. Arguments: blocks, and the number of the barrier to leave out (-1: none).
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>

#include "cuda/grid.cuh"
#include "device/table_clear.h"
#include "device/table_draw.h"

using namespace fastis;
using namespace fastis::device;

namespace {

constexpr int64_t kBatch = 40, kClasses = 5;

struct World {
  DeviceTable table;
  Scalars scalars{};
  Variance variance{};
  Work work{};
  unsigned arrivals = 0;
  std::vector<State> states;
  std::vector<uint64_t> sums;
  std::vector<uint32_t> unseen, capped, excluded, claims;

  World(int64_t n, Flatten flatten, bool has_states) {
    DeviceTable& t = table;
    t.num_samples = n;
    t.batch_size = kBatch;
    t.batches_per_epoch = n / kBatch;
    t.warmup_draws = 2;
    t.seed = 7;
    t.cap_numerator = 2;
    t.total_limit = int64_t{1} << 54;
    t.headroom = 6;
    t.floor = 1e-3;
    t.smoothing = 0.99;
    t.tau = 3;
    t.flatten = flatten;
    t.levels = Levels(n, kDeviceTop);
    t.derive();
    states.assign(static_cast<size_t>(n + kLeaf - 1) / kLeaf * kLeaf, State{0, 0, -1, 0});
    const auto nodes = static_cast<size_t>(t.levels.total());
    sums.resize(nodes);
    unseen.resize(nodes);
    capped.resize(nodes);
    excluded.resize(nodes);
    claims.assign(static_cast<size_t>(n), kUnclaimed);
    scalars.exponent = kNoExponent;
    scalars.uniform_from = kNever;
    t.states = has_states ? states.data() : nullptr;
    t.scalars = &scalars;
    t.variance = &variance;
    t.work = &work;
    t.arrivals = &arrivals;
    t.sums = sums.data();
    t.unseen = unseen.data();
    t.capped = capped.data();
    t.excluded = excluded.data();
    t.claims = claims.data();
  }

  bool operator==(const World& o) const {
    return std::memcmp(states.data(), o.states.data(), states.size() * sizeof(State)) == 0 &&
           sums == o.sums && unseen == o.unseen && capped == o.capped && excluded == o.excluded &&
           claims == o.claims && std::memcmp(&scalars, &o.scalars, sizeof scalars) == 0 &&
           arrivals == 0 &&
           std::abs(variance.second - o.variance.second) <= 1e-12 * std::abs(o.variance.second);
  }
};

struct Draws {
  std::vector<int64_t> indices = std::vector<int64_t>(kBatch);
  std::vector<float> weights = std::vector<float>(kBatch);
  Batch batch() { return {{indices.data()}, {weights.data()}}; }
  bool operator==(const Draws& o) const { return indices == o.indices && weights == o.weights; }
};

class Test {
 public:
  Test(unsigned blocks, int64_t n, Flatten flatten, bool has_states)
      : blocks_(blocks), ours_(n, flatten, has_states), theirs_(n, flatten, has_states) {}

  // Scores that rise and fall by decades, with duplicates and unusable ones; samples that come and
  // go, at times all of those with a score.
  bool run(int steps) {
    std::mt19937_64 random(1);
    std::normal_distribution<float> normal;
    std::vector<float> ones(static_cast<size_t>(ours_.table.num_samples), 1.0f), all, gradient;
    std::vector<int64_t> indices;
    for (int64_t i = 0; i < ours_.table.num_samples * 3 / 4; ++i) {
      indices.push_back(i);
      all.push_back(std::exp(2.5f * normal(random)));
    }
    gradient.assign(kClasses, 0.1f);
    Draws batch;
    update({{indices.data()},
            {ones.data()},
            {all.data()},
            {all.data()},
            static_cast<int64_t>(indices.size()),
            {gradient.data()},
            kClasses});
    for (int step = 0; step < steps; ++step) {
      const int64_t from = step % 8 < 5 ? kNever : ours_.scalars.draws - (step % 8 - 5);
      ours_.scalars.uniform_from = theirs_.scalars.uniform_from = from;
      if (!draw(batch)) return failed("draw", step);
      std::vector<float> score(kBatch);
      const float trend = std::pow(10.0f, std::sin(static_cast<float>(step)) * 8);
      for (float& x : score) x = std::exp(3 * normal(random)) * trend;
      batch.indices[3] = batch.indices[1];
      score[5] = NAN;
      const Observation observation{{batch.indices.data()},
                                    {batch.weights.data()},
                                    {score.data()},
                                    {score.data()},
                                    kBatch,
                                    {gradient.data()},
                                    kClasses};
      if (step % 3 == 0) {
        update(observation);
      } else {
        Draws next;
        if (!update_and_draw(observation, next)) return failed("update and draw", step);
      }
      if (!(ours_ == theirs_)) return failed("table", step);
      if (ours_.table.states == nullptr) continue;
      indices.resize(static_cast<size_t>(step % 4 == 3 ? ours_.table.num_samples : 3 * kBatch));
      for (size_t k = 0; k < indices.size(); ++k) {
        const auto any = static_cast<int64_t>(random() % ours_.table.num_samples);
        indices[k] = step % 4 == 3 ? static_cast<int64_t>(k) : any;
      }
      clear(indices, step % 2 == 0 ? kExcluded : kUnseen);
      if (!(ours_ == theirs_)) return failed("clear", step);
      if (!draw(batch)) return failed("draw after clear", step);
    }
    return true;
  }

 private:
  bool failed(const char* what, int step) const {
    std::printf("DIFFERS: %s in step %d\n", what, step);
    return false;
  }

  template <class F>
  void on_threads(const F& f) {
    launch(blocks_, kThreads, [&] {
      CudaGrid grid(ours_.table.arrivals);
      f(grid);
    });
  }

  void update(const Observation& o) {
    on_threads([&](CudaGrid& grid) { device::update(grid, ours_.table, o); });
    device::update(host_, theirs_.table, o);
  }

  void clear(const std::vector<int64_t>& indices, int32_t last) {
    const auto n = static_cast<int64_t>(indices.size());
    on_threads([&](CudaGrid& grid) { device::clear(grid, ours_.table, indices.data(), n, last); });
    device::clear(host_, theirs_.table, indices.data(), n, last);
  }

  bool draw(Draws& out) {
    Draws expected;
    on_threads([&](CudaGrid& grid) { device::draw(grid, ours_.table, out.batch()); });
    device::draw(host_, theirs_.table, expected.batch());
    return out == expected;
  }

  bool update_and_draw(const Observation& o, Draws& out) {
    Draws expected;
    on_threads([&](CudaGrid& grid) { device::update_and_draw(grid, ours_.table, o, out.batch()); });
    device::update_and_draw(host_, theirs_.table, o, expected.batch());
    return out == expected;
  }

  unsigned blocks_;
  World ours_, theirs_;
  HostGrid host_{7919};
};

bool divides_exactly() {
  std::mt19937_64 random(1);
  const uint64_t most = uint64_t{1} << 62;
  for (int i = 0; i < 300000; ++i) {
    const uint64_t divisor = (random() % most >> random() % 62) + 1;
    uint64_t x = random() >> (1 + random() % 63);
    // One in two is a multiple, or the number before it.
    if (i % 4 < 2) x = x / divisor * divisor - (i % 4 == 1 && x >= divisor ? 1 : 0);
    if (Divisor(divisor).divide(x) != x / divisor) return false;
  }
  return Divisor(1).divide(2 * most - 1) == 2 * most - 1 && Divisor(most).divide(2 * most - 1) == 1;
}

}  // namespace

int main(int argc, char** argv) {
  const unsigned blocks = argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 2;
  left_out = argc > 2 ? std::atoi(argv[2]) : -1;
  if (!divides_exactly()) {
    std::puts("DIFFERS: quotients");
    return 1;
  }
  for (const Flatten flatten : {Flatten::cap, Flatten::mix, Flatten::none}) {
    if (!Test(blocks, 6001, flatten, true).run(flatten == Flatten::cap ? 14 : 6)) return 1;
  }
  // A tree of one level; no tree.
  if (!Test(blocks, 900, Flatten::cap, true).run(5)) return 1;
  return Test(blocks, 900, Flatten::none, false).run(3) ? 0 : 1;
}
