// The CPU's half of fastis.h, included once per instruction set (hence no include guard).
// Shapes in brackets; N: samples, B: minibatch, n: observations, C: classes.

namespace fastis::FASTIS_NAMESPACE {

// SIMD lanes (floats) that this build uses.
int lanes();

// Are all n indices in [0, num_samples)?
bool in_range(Pointer<const int64_t> indices /* [n] */, int64_t n, int64_t num_samples);

// One iteration: the observed scores into the state and the sampling structure (unless the table has
// no records), the variance moments, and the clock of updates.
void update(const Table& table, Pointer<const int64_t> indices /* [n] */,
            Pointer<const float> observed /* [n] */, Pointer<const float> weights /* [n] */,
            Pointer<const float> score /* [n] */, int64_t n,
            Pointer<const float> mean_grad /* [C] */, int64_t num_classes);

// The next minibatch: without replacement in the warm-up, by importance (or uniformly) after it.
void draw(const Table& table, Pointer<int64_t> indices /* [B] */,
          Pointer<float> weights /* [B] */);

// An alias table of n integer weights (`total` is their sum), and `count` draws from it, the
// first of them number `first` of the stream of `seed`; coefficients = total / (n weight).
void alias_build(Pointer<const uint64_t> weights /* [n] */, int64_t n, uint64_t total,
                 Pointer<uint64_t> own /* [n] */, Pointer<int64_t> alias /* [n] */);
void alias_draw(Pointer<const uint64_t> weights /* [n] */, Pointer<const uint64_t> own /* [n] */,
                Pointer<const int64_t> alias /* [n] */, int64_t n, uint64_t total, uint64_t seed,
                int64_t first, int64_t count, Pointer<int64_t> indices /* [count] */,
                Pointer<float> coefficients /* [count] */);
void draw_points(uint64_t total, uint64_t seed, int64_t first, int64_t count,
                 Pointer<int64_t> points /* [count] */);

}  // namespace fastis::FASTIS_NAMESPACE
