// csrc/cuda/scale.cu on the host: the same packs, in an order that `stride` permutes.
#pragma once

#include "device/grid.h"
#include "device/scale.h"
#include "fastis.h"

namespace fastis::emulated {

inline int64_t scale_grad(const ScaleGrad& call, uint64_t stride) {
  return device::with_formats(call, [&](const auto& scaling) -> int64_t {
    if (!scaling.nothing_to_do()) device::HostBlock(stride).each(scaling.packs(), scaling);
    return 0;
  });
}

}  // namespace fastis::emulated
