// The statistics of a chunk of any layout, and the choice of the instruction set.
#include <algorithm>
#include <cstdint>

#include "core/float8.h"
#include "core/half.h"
#include "core/layout.h"
#include "core/stats.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"

#define GRADPROBE_PER_ISA "cpu/grad_stats_loops.h"
#include "cpu/each_isa.h"

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
  const auto stats = GRADPROBE_CHOOSE(isa, elements_stats);
  return stats(dtype, data, n);
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

template <typename Float8>
void widen(const View& view, int64_t begin, int64_t n, float* out) {
  const auto* data = static_cast<const Float8*>(view.data);
  const auto widen_run = [&](int64_t offset, int64_t stride, int64_t count) {
    for (int64_t i = 0; i < count; ++i) *out++ = widened(data[offset + i * stride]);
  };
  if (view.dims == nullptr) return widen_run(begin, 1, n);
  walk(*view.dims, begin, n, widen_run);
}

Stats float8_stats(const View& view, int64_t begin, int64_t end, Isa isa) {
  constexpr int64_t kBuffer = 4096;
  alignas(64) float buffer[kBuffer];
  Stats stats = identity();
  for (int64_t i = begin; i < end; i += kBuffer) {
    const int64_t n = std::min(kBuffer, end - i);
    widen_float8(view, i, n, buffer);
    stats = merge(stats, dense_stats(Dtype::kFloat32, buffer, n, isa));
  }
  return stats;
}

}  // namespace

void widen_float8(const View& view, int64_t begin, int64_t n, float* out) {
  const auto widen_elements = view.dtype == Dtype::kFloat8E4M3 ? widen<Float8E4M3> : widen<Float8E5M2>;
  widen_elements(view, begin, n, out);
}

Stats chunk_stats(const View& view, int64_t begin, int64_t end, Isa isa) {
  if (is_float8(view.dtype)) return float8_stats(view, begin, end, isa);
  const int64_t width = item_bytes(view.dtype);
  if (view.dims == nullptr) {
    return dense_stats(view.dtype, static_cast<const char*>(view.data) + begin * width, end - begin, isa);
  }
  return width == 8   ? gathered_stats<uint64_t>(view, begin, end, isa)
         : width == 4 ? gathered_stats<uint32_t>(view, begin, end, isa)
                      : gathered_stats<uint16_t>(view, begin, end, isa);
}

}  // namespace gradprobe::cpu
