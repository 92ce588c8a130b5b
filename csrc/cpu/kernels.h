// The CPU kernels: raw pointers in, statistics out. No torch, no threads: register.cpp brings both.
#pragma once

#include <cstdint>

#include "core/layout.h"
#include "core/stats.h"

namespace gradprobe::cpu {

enum class Dtype : int { kFloat16, kBFloat16, kFloat32, kFloat64 };

inline constexpr int64_t item_bytes(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// Elements of a chunk, the unit of work of a thread. Fixed, so that results do not depend on the number of threads.
inline constexpr int64_t kChunkNumel = 65536;

// The instruction sets that the kernels are compiled for.
enum class Isa : int { kBaseline, kAvx2, kAvx512 };
inline constexpr int kIsas = 3;

bool can_run(Isa isa);  // on this processor, and compiled in
Isa best_isa();

// A tensor as the kernels see it. `strides` is null for dense memory.
struct View {
  const void* data;
  Dtype dtype;
  int64_t numel;
  const Dims* dims;  // null: dense, walked as flat memory
};

// Statistics of elements [begin, end) of the view in walking order, end - begin <= kChunkNumel. Needs a
// FloatEnvironment in force.
Stats chunk_stats(const View& view, int64_t begin, int64_t end, Isa isa);

// Multiplies elements [begin, end) in place, each product rounded once to the dtype: in double for kFloat64, else in
// float.
void scale_chunk(const View& view, int64_t begin, int64_t end, double coefficient, Isa isa);

}  // namespace gradprobe::cpu
