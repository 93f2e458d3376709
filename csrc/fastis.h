// Every entry point of fastis._C. The extension is a leaf: it takes pointers and sizes, knows
// nothing of torch, and allocates nothing that outlives a call; outputs are passed in.
#pragma once

#include <cstdint>

#include "table.h"

namespace fastis {

// A raw device or host address that arrives from Python as an integer (0: no such tensor).
template <class T>
struct Pointer {
  T* address = nullptr;
  operator T*() const { return address; }
  T* operator->() const { return address; }
};

}  // namespace fastis

// The CPU entry points exist once per instruction set, each in a namespace of its own.
#define FASTIS_NAMESPACE baseline
#include "cpu/entry_points.h"
#undef FASTIS_NAMESPACE
#ifdef FASTIS_X86
#define FASTIS_NAMESPACE avx2
#include "cpu/entry_points.h"
#undef FASTIS_NAMESPACE
#define FASTIS_NAMESPACE avx512
#include "cpu/entry_points.h"
#undef FASTIS_NAMESPACE
#endif
