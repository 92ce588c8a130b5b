// Replaces the CUDA toolkit's header of this name (see emulation.h): conversions of __nv_bfloat16, and functions of
// pairs.
#pragma once

#include <cstdint>
#include <cstring>

#include "pairs.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return {0x7fff};
  bits += 0x7fff + (bits >> 16 & 1);  // to nearest, ties to even
  return {static_cast<uint16_t>(bits >> 16)};
}

struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
EMULATED_PAIR(__nv_bfloat162, __bfloat162float, __float2bfloat16_rn)
