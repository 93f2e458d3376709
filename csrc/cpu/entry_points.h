// The CPU's half of fastis.h, included once per instruction set (hence no include guard).
// Shapes in brackets; N: samples, B: minibatch, n: observations, C: classes.

namespace fastis::FASTIS_NAMESPACE {

// -1, or the first row with a label out of range, and then nothing was written.
int64_t cross_entropy(const CrossEntropy& call);
// Binary cross-entropy with logits and squared error.
void elementwise_loss(const ElementwiseLoss& call);

// One iteration: the observed scores into the states and the tree (unless the table has no states),
// the variance moments, and the clock of updates. An index out of range is an IndexError, before
// anything has changed.
void update(Pointer<const Table> table, const Observation& observation);

// The observed scores alone, as of an `iteration` that may be past (below 0: the present one): no
// moments, no clock. The table has states; of the observation the weights, the score and the mean
// gradient are not read.
void fold(Pointer<const Table> table, const Observation& observation, int64_t iteration);

// These samples have no score any more: `last` is kUnseen, or kExcluded. O(n) but for a rescale.
// The table has states; an index out of range is an IndexError, before anything has changed.
void clear(Pointer<const Table> table, Pointer<const int64_t> indices /* [n] */, int64_t n,
           int32_t last);

// The next minibatch: without replacement in the warm-up, by importance (or uniformly) after it. A
// ValueError where all samples are excluded, before anything has changed.
void draw(Pointer<const Table> table, const Batch& batch);

// Of a shard with capped items at `theta`: the sum of the others' weights, and how many are capped;
// 0 and all of them where nothing has been seen, and all are alike.
void shard_total(Pointer<const Table> table, uint64_t theta, Pointer<int64_t> found /* [2] */);

// The rank's part of the next minibatch of all shards, after shard_total(); how many draws it is.
int64_t draw_share(Pointer<const Table> table, const Share& share,
                   const Batch& batch /* [share.count] */);

// Codes, e0 and totals anew from the states of all samples, which have been written from outside.
void rescale(Pointer<const Table> table);

// One saved state into another, without the flags of capped items. A caller that holds the GIL gets
// all of one moment.
void copy_state(int64_t num_scalars, int64_t num_states, const Durable& from, const Durable& to);

// Can these states be those of a table with this clock and e0? The first that can't, or -1; then
// `found` is how many are seen, the sum of their integer weights (-1: 2^63 or more), and how many
// are excluded.
int64_t check_states(Pointer<const State> states /* [N] */, int64_t n, int64_t updates,
                     int exponent, Importance importance, Pointer<int64_t> found /* [3] */);

// Categorical: draws from fixed weights.

// Finds the shift with which the integers add up to about 2^61 (0 for integers) and that total;
// fills weights.prefix [ceil(N / 64)]. Reads format, values and n of the weights. False: a weight
// is negative or not finite, or all are 0.
bool quantize(const IntegerWeights& weights, int threads,
              Pointer<int64_t> shift_and_total /* [2] */);
void integer_weights(const IntegerWeights& weights, int threads, Pointer<uint64_t> out /* [N] */);
// Coefficients are total / (N integer).
void categorical_draw(const IntegerWeights& weights, const Draws& draws,
                      const Batch& batch /* [count] */);
void alias_build(const IntegerWeights& weights, int threads, Pointer<Bucket> table /* [N] */);
void alias_draw(const AliasTable& table, const Draws& draws, const Batch& batch /* [count] */);
// The items at points below the total.
void alias_inverse_cdf(const AliasTable& table, Pointer<const uint64_t> points /* [count] */,
                       int64_t count, const Batch& batch /* [count] */);
// Uniform in [0, total).
void random_below(uint64_t total, const Draws& draws, Pointer<uint64_t> out /* [count] */);

// Batch normalisation with statistics weighted by `share`, which sums to 1. format: 0 float,
// 1 double, 2 bfloat16 of x, y and their gradients; other tensors are float (double for double).
void batch_norm_forward(Format format, BatchNormShape shape, Pointer<const void> x,
                        Pointer<const void> share /* [B] */,
                        Pointer<const void> weight /* [C], or null */,
                        Pointer<const void> bias /* [C], or null */, double eps, Running running,
                        Pointer<void> mean /* [C] */, Pointer<void> var /* [C] */, Pointer<void> y,
                        int threads);
void batch_norm_backward(Format format, BatchNormShape shape, Pointer<const void> dy,
                         Pointer<const void> x, Pointer<const void> share /* [B] */,
                         Pointer<const void> weight /* [C], or null */,
                         Pointer<const void> mean /* [C] */, Pointer<const void> var /* [C] */,
                         double eps, Pointer<void> dx /* or null */,
                         Pointer<void> grad_weight /* [C] */, Pointer<void> grad_bias /* [C] */,
                         int threads);

}  // namespace fastis::FASTIS_NAMESPACE
