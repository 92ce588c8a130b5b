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

// Converts a number whose exponent and fraction belong `shift` bits higher in a float32. The product with `rebias`
// changes the exponent's bias to that of float32, exactly for subnormal numbers too, unless the caller flushes them.
// Magnitudes from `first_special` on are infinite or NaN.
GRADPROBE_HD float widened_float8(uint8_t bits, int shift, float rebias, uint32_t first_special) {
  const uint32_t magnitude = bits & 0x7fu;
  const uint32_t moved = (bits & 0x80u) << 24 | magnitude << shift;
  return magnitude < first_special ? float_of_bits(static_cast<int32_t>(moved)) * rebias
                                   : float_of_bits(static_cast<int32_t>(moved | kFloatInfBits));
}

GRADPROBE_HD float widened(Float8E4M3 x) { return widened_float8(x.bits, 20, 0x1p+120f, 0x7f); }
GRADPROBE_HD float widened(Float8E5M2 x) { return widened_float8(x.bits, 21, 0x1p+112f, 0x7c); }

}  // namespace gradprobe
