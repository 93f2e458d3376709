// How wide this instruction set is; the one fact about it that Python shows.
#include "fastis.h"

namespace fastis::FASTIS_ISA {

int lanes() {
#if defined(__AVX512F__)
  return 16;
#elif defined(__AVX2__)
  return 8;
#else
  return 4;
#endif
}

}  // namespace fastis::FASTIS_ISA
