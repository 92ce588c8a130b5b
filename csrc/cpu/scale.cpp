// Multi-tensor multiplication in place on the CPU. Flush modes stay as the caller has them, as in torch's own mul_.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/layout.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace gradprobe::cpu {
namespace {

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

// Rounds to nearest, ties to even.
inline uint16_t narrow_to_bfloat16(float x) {
  const uint32_t bits = bits_from_float(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40;  // quiet, and not an infinity after the cut
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

// Subnormal float16 through the integer of their fraction: right also where the caller flushes subnormal float32.
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
  if (magnitude >= 0x477ff000) {  // from 65520 on: infinity, or NaN
    half = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  } else if (magnitude >= 0x38800000) {  // normal, from 2**-14 on
    half = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  } else {  // the unit of 0.5f is that of subnormal float16: the addition rounds
    half = bits_from_float(float_from_bits(magnitude) + 0.5f) - bits_from_float(0.5f);
  }
  return static_cast<uint16_t>(sign | half);
}

}  // namespace
}  // namespace gradprobe::cpu

#define GRADPROBE_LOOPS baseline
#define GRADPROBE_HAS_F16C 0
#include "cpu/scale_loops.h"

#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define GRADPROBE_LOOPS avx2
#define GRADPROBE_HAS_F16C 1
#include "cpu/scale_loops.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace gradprobe::cpu {
namespace {

void scale_dense(Dtype dtype, void* data, int64_t n, double coefficient, Isa isa) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (isa != Isa::kBaseline) return avx2::scale(dtype, data, n, coefficient);
#endif
  (void)isa;
  baseline::scale(dtype, data, n, coefficient);
}

template <typename Word>
void scale_strided(const View& view, int64_t begin, int64_t end, double coefficient, Isa isa) {
  constexpr int64_t kBuffer = 16384 / sizeof(Word);
  alignas(64) Word buffer[kBuffer];
  auto* data = static_cast<Word*>(const_cast<void*>(view.data));
  for (int64_t i = begin; i < end; i += kBuffer) {
    const int64_t n = std::min(kBuffer, end - i);
    gather(data, *view.dims, i, n, buffer);
    scale_dense(view.dtype, buffer, n, coefficient, isa);
    scatter(buffer, *view.dims, i, n, data);
  }
}

}  // namespace

void scale_chunk(const View& view, int64_t begin, int64_t end, double coefficient, Isa isa) {
  const int64_t width = item_bytes(view.dtype);
  if (view.dims == nullptr) {
    char* data = static_cast<char*>(const_cast<void*>(view.data)) + begin * width;
    return scale_dense(view.dtype, data, end - begin, coefficient, isa);
  }
  if (width == 8) return scale_strided<uint64_t>(view, begin, end, coefficient, isa);
  if (width == 4) return scale_strided<uint32_t>(view, begin, end, coefficient, isa);
  scale_strided<uint16_t>(view, begin, end, coefficient, isa);
}

}  // namespace gradprobe::cpu
