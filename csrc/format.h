// Formats of numbers in memory, as every entry point takes them; fastis/kernels/formats.py has the
// same codes.
#pragma once

#include <cstdint>

namespace fastis {

enum class Format : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3, int64 = 4 };

}  // namespace fastis
