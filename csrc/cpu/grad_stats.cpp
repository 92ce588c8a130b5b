// grad_stats on the CPU: choice of the instruction set, and chunks of any layout.
#include <algorithm>
#include <cstdint>

#include "cpu/half.h"
#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "stats.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define GRADPROBE_X86_LEVELS
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
// Vectors never cross the boundary of a function that is not inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
// GCC's own AVX-512 headers start from a register that they leave undefined on purpose (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define GRADPROBE_LANES baseline
#define GRADPROBE_VECTOR_BYTES 16
#include "cpu/grad_stats_lanes.h"

#if defined(GRADPROBE_X86_LEVELS)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define GRADPROBE_LANES avx2
#define GRADPROBE_VECTOR_BYTES 32
#include "cpu/grad_stats_lanes.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("popcnt,avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("popcnt,avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define GRADPROBE_LANES avx512
#define GRADPROBE_VECTOR_BYTES 64
#include "cpu/grad_stats_lanes.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // GRADPROBE_X86_LEVELS

namespace gradprobe::cpu {

bool can_run(Isa isa) {
#if defined(GRADPROBE_X86_LEVELS)
  __builtin_cpu_init();
  switch (isa) {
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("popcnt") && can_run(Isa::kAvx2);
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::kBaseline:
      break;
  }
#endif
  return isa == Isa::kBaseline;
}

Isa best_isa() {
  static const Isa best = can_run(Isa::kAvx512) ? Isa::kAvx512 : can_run(Isa::kAvx2) ? Isa::kAvx2 : Isa::kBaseline;
  return best;
}

namespace {

Stats dense_stats(Dtype dtype, const void* data, int64_t n, Isa isa) {
#if defined(GRADPROBE_X86_LEVELS)
  if (isa == Isa::kAvx512) return avx512::stats_of(dtype, data, n);
  if (isa == Isa::kAvx2) return avx2::stats_of(dtype, data, n);
#endif
  (void)isa;
  return baseline::stats_of(dtype, data, n);
}

template <typename Word>
Stats gathered_stats(const View& view, int64_t begin, int64_t end, Isa isa) {
  constexpr int64_t kBuffer = 16384 / sizeof(Word);
  alignas(64) Word buffer[kBuffer];
  Stats stats = identity();
  for (int64_t i = begin; i < end; i += kBuffer) {
    const int64_t n = std::min(kBuffer, end - i);
    gather(static_cast<const Word*>(view.data), *view.dims, i, n, buffer);
    stats = merge(stats, dense_stats(view.dtype, buffer, n, isa));
  }
  return stats;
}

}  // namespace

Stats chunk_stats(const View& view, int64_t begin, int64_t end, Isa isa) {
  const int64_t width = item_bytes(view.dtype);
  if (view.dims == nullptr) {
    return dense_stats(view.dtype, static_cast<const char*>(view.data) + begin * width, end - begin, isa);
  }
  return width == 8   ? gathered_stats<uint64_t>(view, begin, end, isa)
         : width == 4 ? gathered_stats<uint32_t>(view, begin, end, isa)
                      : gathered_stats<uint16_t>(view, begin, end, isa);
}

}  // namespace gradprobe::cpu
