// The CPU's half of fastis.h, included once per instruction set (hence no include guard).
// Shapes in brackets; N: samples, B: minibatch, n: observations, C: classes.

namespace fastis::FASTIS_NAMESPACE {

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

// -1, or the first row with a label out of range, and then nothing was written.
int64_t cross_entropy(const CrossEntropy& call);
// Binary cross-entropy with logits and squared error.
void elementwise_loss(const ElementwiseLoss& call);

}  // namespace fastis::FASTIS_NAMESPACE
