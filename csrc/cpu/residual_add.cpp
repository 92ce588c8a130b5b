// The junction of a residual block on the CPU. A chunk is written in the caller's flush mode, as torch's own add and
// relu write it; its statistics are then taken from cache, where subnormal numbers count: main memory sees each operand
// once.
#include "cpu/residual_add.h"

#include <cstdint>
#include <cstring>

#include "cpu/float_env.h"
#include "cpu/half.h"
#include "cpu/kernels.h"
#include "stats.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#define GRADPROBE_LOOPS baseline
#define GRADPROBE_HAS_F16C 0
#include "cpu/residual_loops.h"

#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define GRADPROBE_LOOPS avx2
#define GRADPROBE_HAS_F16C 1
#include "cpu/residual_loops.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace gradprobe::cpu {
namespace {

Stats flat_stats(Dtype dtype, const void* data, int64_t n, Isa isa) {
  const FloatEnvironment environment;
  return chunk_stats({data, dtype, n, nullptr}, 0, n, isa);
}

const char* at(const void* data, int64_t offset) { return static_cast<const char*>(data) + offset; }
char* at(void* data, int64_t offset) { return static_cast<char*>(data) + offset; }

}  // namespace

void add_chunk(Dtype dtype, const void* x, const void* f, void* y, int64_t begin, int64_t end, bool relu, Isa isa,
               Stats* of_y) {
  const int64_t n = end - begin;
  const int64_t offset = begin * item_bytes(dtype);
  auto* add = &baseline::join_dense;
#if defined(__x86_64__) && defined(__GNUC__)
  if (isa != Isa::kBaseline) add = &avx2::join_dense;
#endif
  add(dtype, at(x, offset), at(f, offset), at(y, offset), n, relu);
  if (of_y != nullptr) *of_y = flat_stats(dtype, at(y, offset), n, isa);
}

void mask_chunk(Dtype dtype, const void* grad_y, const void* y, void* grad_x, int64_t begin, int64_t end, Isa isa,
                Stats* of_both) {
  const int64_t n = end - begin;
  const int64_t offset = begin * item_bytes(dtype);
  if (y == nullptr) {
    std::memcpy(at(grad_x, offset), at(grad_y, offset), n * item_bytes(dtype));
  } else {
    auto* mask = &baseline::mask_dense;
#if defined(__x86_64__) && defined(__GNUC__)
    if (isa != Isa::kBaseline) mask = &avx2::mask_dense;
#endif
    mask(dtype, at(grad_y, offset), at(y, offset), at(grad_x, offset), n);
  }
  if (of_both == nullptr) return;
  of_both[0] = flat_stats(dtype, at(grad_y, offset), n, isa);
  of_both[1] = y == nullptr ? of_both[0] : flat_stats(dtype, at(grad_x, offset), n, isa);
}

}  // namespace gradprobe::cpu
