// The CPU kernels: raw pointers in, statistics out, one chunk per call and without threads. parallel.h runs them on
// many tensors.
#pragma once

#include <cstdint>

#include "core/layout.h"
#include "core/magnitudes.h"
#include "core/stats.h"

namespace gradprobe::cpu {

enum class Dtype : int { kFloat16, kBFloat16, kFloat32, kFloat64, kFloat8E4M3, kFloat8E5M2 };

// Only grad_stats and magnitudes take float8.
inline constexpr bool is_float8(Dtype dtype) { return dtype == Dtype::kFloat8E4M3 || dtype == Dtype::kFloat8E5M2; }

inline constexpr int64_t item_bytes(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : is_float8(dtype) ? 1 : 2;
}

// Elements of a chunk, a thread's unit of work. Constant, so that results do not depend on the number of threads.
inline constexpr int64_t kChunkNumel = 65536;

// The instruction sets that the kernels are compiled for.
enum class Isa : int { kBaseline, kAvx2, kAvx512 };
inline constexpr int kIsas = 3;

bool can_run(Isa isa);  // whether this processor has it and we compiled for it
Isa best_isa();

// A tensor as the kernels see it.
struct View {
  const void* data;
  Dtype dtype;
  int64_t numel;
  const Dims* dims;  // null for dense memory, which is visited as one flat range
};

// Returns the statistics of elements [begin, end) of the view in the order of `dims`, with end - begin <= kChunkNumel.
// Requires a FloatEnvironment.
Stats chunk_stats(const View& view, int64_t begin, int64_t end, Isa isa);

// Writes elements [begin, begin + n) of a float8 view, in the order of `dims`, as float32. Requires a FloatEnvironment.
void widen_float8(const View& view, int64_t begin, int64_t n, float* out);

// Adds elements [begin, end) of the view to counts [kCounts], and returns their moments. Requires a FloatEnvironment.
Moments count_magnitudes(const View& view, int64_t begin, int64_t end, int64_t* counts);

// Multiplies elements [begin, end) in place, in double for kFloat64, else in float, and rounds each product to the
// dtype once.
void scale_chunk(const View& view, int64_t begin, int64_t end, double coefficient, Isa isa);

}  // namespace gradprobe::cpu
