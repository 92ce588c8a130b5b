// The two formats of 8 bits of "FP8 formats for deep learning" (Micikevicius et al. 2022), on host and device. They are
// read only: no kernel writes them.
#pragma once

#include <cstdint>

#include "core/stats.h"  // GRADPROBE_HD, float_of_bits

namespace gradprobe {

// 4 bits of exponent and 3 of fraction. No infinities; NaN if all of these are set.
struct Float8E4M3 {
  uint8_t bits;
};

// 5 bits of exponent and 2 of fraction: the upper half of a float16.
struct Float8E5M2 {
  uint8_t bits;
};

// Moves sign, exponent and fraction to where a float32 has them. The product with `rebias` changes the exponent's bias
// to that of float32, exactly for subnormal numbers too, unless the caller flushes them. Magnitudes that it brings to
// `limit` or above are infinite or NaN.
GRADPROBE_HD float widened_float8(uint8_t bits, int shift, float rebias, float limit) {
  const int32_t moved = static_cast<int32_t>(uint32_t{bits} << 24) >> shift & (INT32_MIN | 0x7f000000 >> shift);
  const float finite = float_of_bits(moved) * rebias;
  return fabsf(finite) < limit ? finite : float_of_bits(moved | kFloatInfBits);
}

GRADPROBE_HD float widened(Float8E4M3 x) { return widened_float8(x.bits, 4, 0x1p+120f, 480.0f); }
GRADPROBE_HD float widened(Float8E5M2 x) { return widened_float8(x.bits, 3, 0x1p+112f, 0x1p+16f); }

}  // namespace gradprobe
