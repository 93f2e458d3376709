// The CPU's half of fastis.h, included once per instruction set (hence no include guard).
// Shapes in brackets; N: samples, B: minibatch, n: observations, C: classes.

namespace fastis::FASTIS_NAMESPACE {

// SIMD lanes (floats) that this build uses.
int lanes();

// One iteration: the observed scores into the state and the sampling structure (unless the table
// has no records), the variance moments, and the clock of updates. False: an index is out of range,
// and nothing has changed.
bool update(Pointer<const Table> table, Pointer<const int64_t> indices /* [n] */,
            Pointer<const float> observed /* [n] */, Pointer<const float> weights /* [n] */,
            Pointer<const float> score /* [n] */, int64_t n,
            Pointer<const float> mean_grad /* [C] */, int64_t num_classes);

// Codes, e0 and totals anew from the states of all samples, which have been written from outside.
void rescale(Pointer<const Table> table);

// One state into another, without the flags of capped items. A caller that holds the GIL gets all
// of one moment.
void copy_state(int64_t num_scalars, int64_t num_records, Pointer<const int64_t> from_scalars,
                Pointer<const Variance> from_variance, Pointer<const Record> from_records /* [N] */,
                Pointer<int64_t> to_scalars, Pointer<Variance> to_variance,
                Pointer<Record> to_records /* [N] */);

// Can these records be those of a table with this clock and e0? The first that can't, or -1; then
// `found` is how many are seen and the sum of their integer weights (-1: 2^63 or more).
int64_t check_records(Pointer<const Record> records /* [N] */, int64_t n, int64_t updates,
                      int exponent, int importance, Pointer<int64_t> found /* [2] */);

// The next minibatch: without replacement in the warm-up, by importance (or uniformly) after it.
void draw(Pointer<const Table> table, Pointer<int64_t> indices /* [B] */,
          Pointer<float> weights /* [B] */);

// What a draw does with points of its own: the items at `points`, each below the total of the
// distribution as it stands (past the warm-up; only for tables with records).
void locate(Pointer<const Table> table, Pointer<const uint64_t> points /* [count] */, int64_t count,
            Pointer<int64_t> indices /* [count] */, Pointer<float> weights /* [count] */);

// Draws from given weights. format: 0 float, 1 double, 2 bfloat16, 3 float16 of the weights, whose
// integers are floor(w 2^shift), at least 1 where w > 0; 4: int64, the integers themselves.
// weigh: the shift with which they add up to about 2^61, that total, and the running sums of groups
// of 64. False: a weight is negative or not finite, or all are 0.
bool weigh(int format, Pointer<const void> weights /* [N] */, int64_t n, int threads,
           Pointer<uint64_t> ends /* [ceil(N / 64)] */, Pointer<int64_t> shift_and_total /* [2] */);
void integers(int format, Pointer<const void> weights /* [N] */, int64_t n, int shift, int threads,
              Pointer<uint64_t> out /* [N] */);
// `count` draws, the first of them number `first` of the stream of `seed`, by searching `ends`;
// coefficients = total / (N integer).
void search(int format, Pointer<const void> weights /* [N] */, int64_t n, int shift,
            Pointer<const uint64_t> ends, uint64_t total, uint64_t seed, int64_t first,
            int64_t count, Pointer<int64_t> indices /* [count] */,
            Pointer<float> coefficients /* [count] */);
// The alias table of the weights; draws from it, or the items of given points below the total.
void alias_build(int format, Pointer<const void> weights /* [N] */, int64_t n, int shift,
                 uint64_t total, int threads, Pointer<uint64_t> table /* [N, 2] */);
void alias_draw(Pointer<const uint64_t> table /* [N, 2] */, int64_t n, uint64_t total,
                uint64_t seed, int64_t first, int64_t count, Pointer<int64_t> indices /* [count] */,
                Pointer<float> coefficients /* [count] */);
void alias_resolve(Pointer<const uint64_t> table /* [N, 2] */, int64_t n, uint64_t total,
                   Pointer<const uint64_t> points /* [count] */, int64_t count,
                   Pointer<int64_t> indices /* [count] */, Pointer<float> coefficients);
void draw_points(uint64_t total, uint64_t seed, int64_t first, int64_t count,
                 Pointer<uint64_t> points /* [count] */);

// Cross-entropy: loss, score and gradient in one pass. format: 0 float, 1 double, 2 bfloat16,
// 3 float16 of the logits; other tensors are float (double for double), grad is in the logits'
// format (float for float16). A null pointer: no such tensor.
// Returns -1, or the first row with a label out of range, and then nothing was written.
int64_t cross_entropy(int format, Pointer<const void> logits /* [B T, C], unit column stride */,
                      int64_t row_stride, Pointer<const int64_t> target /* [B T], or null */,
                      Pointer<const void> soft /* [B T, C], or null */,
                      Pointer<const void> weights /* [B] */,
                      Pointer<const void> class_weights /* [C] */, int64_t B, int64_t T, int64_t C,
                      int64_t ignore_index, double smoothing,
                      double denominator /* NaN: torch's, from the labels */, bool reduce,
                      Pointer<void> grad /* [B T, C] */,
                      Pointer<void> loss /* [1], or [B] unless reduce */,
                      Pointer<void> losses /* [B] */, Pointer<void> score /* [B] */,
                      Pointer<void> mean_grad /* [C], T = 1 */, int threads);

// kind 0: binary cross-entropy with logits, 1: squared error; the rest as above.
void label_loss(int kind, int format, Pointer<const void> logits /* [B, L] */,
                Pointer<const void> target /* [B, L] */, Pointer<const void> weights /* [B] */,
                Pointer<const void> pos_weight /* [L] */, int64_t B, int64_t L,
                double divisor /* of a sample's sum over labels: 1 or L */, double denominator,
                bool reduce, Pointer<void> grad /* [B, L] */, Pointer<void> loss,
                Pointer<void> losses, Pointer<void> score, Pointer<void> mean_grad /* [L] */,
                int threads);

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
