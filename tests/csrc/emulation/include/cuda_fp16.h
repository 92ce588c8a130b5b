// Replaces the CUDA toolkit's header of this name (see emulation.h): conversions of __half, with the host's _Float16,
// and functions of pairs.
#pragma once

#include "pairs.h"

struct __half {
  _Float16 value;
};

inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }

struct __half2 {
  __half x, y;
};
EMULATED_PAIR(__half2, __half2float, __float2half_rn)
