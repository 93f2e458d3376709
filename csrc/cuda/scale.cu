// The backward pass: the saved gradient times the incoming one, and nothing at all where that is 1
// and the gradient may be scaled where it lies. Moves a read and a write of the gradient.
#include "cuda/launch.h"
#include "cuda/tiles.cuh"
#include "device/scale.h"
#include "fastis.h"

namespace fastis::cuda {
namespace {

template <class Scaling>
__global__ void __launch_bounds__(device::kThreads) scale_kernel(const Scaling scaling) {
  if (scaling.nothing_to_do()) return;
  threads().each(scaling.packs(), [&](int64_t pack) { scaling(pack); });
}

}  // namespace

int64_t scale_grad(const ScaleGrad& call, int64_t device, uint64_t stream) {
  return device::with_formats(call, [&](const auto& scaling) -> int64_t {
    using Scaling = std::decay_t<decltype(scaling)>;
    return launch<scale_kernel<Scaling>>(device, stream, scaling.packs(), scaling);
  });
}

}  // namespace fastis::cuda
