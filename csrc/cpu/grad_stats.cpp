// The statistics of a chunk of any layout, and the choice of the instruction set.
#include <algorithm>
#include <cstdint>

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
