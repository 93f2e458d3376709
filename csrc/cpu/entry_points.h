// The CPU's half of fastis.h, included once per instruction set (hence no include guard).
// Shapes in brackets; B: minibatch, C: classes, N: samples.

namespace fastis::FASTIS_NAMESPACE {

// SIMD lanes (floats) that this build uses.
int lanes();

}  // namespace fastis::FASTIS_NAMESPACE
