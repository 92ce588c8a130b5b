// Converts half-precision numbers to float32 and back in plain arithmetic, for processors without an instruction.
#pragma once

#include <cstdint>
#include <cstring>

namespace gradprobe::cpu {

// Storage of the half-precision types.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float float_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t bits_from_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float widen_bfloat16(uint16_t half) { return float_from_bits(uint32_t{half} << 16); }

// Rounds to nearest, ties to even.
inline uint16_t narrow_to_bfloat16(float x) {
  const uint32_t bits = bits_from_float(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40;  // quiet, so that truncation cannot make it infinite
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

// Converts a subnormal float16 through its integer fraction, which is right even if the caller flushes subnormals.
inline float widen_float16(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  if (magnitude < 0x400) {
    return float_from_bits(sign | bits_from_float(static_cast<float>(static_cast<int>(magnitude)) * 0x1p-24f));
  }
  const uint32_t exponent_shift = magnitude >= 0x7c00 ? 224u << 23 : 112u << 23;
  return float_from_bits(sign | ((magnitude << 13) + exponent_shift));
}

// Rounds to nearest, ties to even.
inline uint16_t narrow_to_float16(float x) {
  const uint32_t bits = bits_from_float(x);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude >= 0x477ff000) {  // 65520 and above: infinity, or NaN
    half = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  } else if (magnitude >= 0x38800000) {  // 2**-14 and above: normal
    half = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  } else {  // 0.5f and subnormal float16 have the same unit in the last place: the addition rounds
    half = bits_from_float(float_from_bits(magnitude) + 0.5f) - bits_from_float(0.5f);
  }
  return static_cast<uint16_t>(sign | half);
}

}  // namespace gradprobe::cpu
