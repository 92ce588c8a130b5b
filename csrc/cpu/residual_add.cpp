// The junction of a residual block on the CPU. A chunk is written in the caller's flush mode, as torch's own add and
// relu write it; its statistics are taken on the way, or from cache, and count subnormal numbers in either mode: main
// memory sees each operand once.
#include "cpu/residual_add.h"

#include <cstdint>

#include "cpu/float_env.h"
#include "cpu/half.h"
#include "cpu/kernels.h"
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
#define GRADPROBE_LOOPS baseline
#define GRADPROBE_HAS_F16C 0
#include "cpu/residual_loops.h"

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
#define GRADPROBE_LOOPS avx2
#define GRADPROBE_HAS_F16C 1
#include "cpu/residual_loops.h"
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
#define GRADPROBE_LOOPS avx512
#define GRADPROBE_HAS_F16C 1
#include "cpu/residual_loops.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // GRADPROBE_X86_LEVELS

namespace gradprobe::cpu {
namespace {

const char* at(const void* data, int64_t offset) {
  return data == nullptr ? nullptr : static_cast<const char*>(data) + offset;
}
char* at(void* data, int64_t offset) { return static_cast<char*>(data) + offset; }

}  // namespace

void add_chunk(Dtype dtype, const void* x, const void* f, void* y, int64_t begin, int64_t end, bool relu, Isa isa,
               Stats* of_y) {
  const int64_t offset = begin * item_bytes(dtype);
  auto* join = &baseline::join_chunk;
#if defined(GRADPROBE_X86_LEVELS)
  if (isa == Isa::kAvx2) join = &avx2::join_chunk;
  if (isa == Isa::kAvx512) join = &avx512::join_chunk;
#endif
  (void)isa;
  join(dtype, at(x, offset), at(f, offset), at(y, offset), end - begin, relu, of_y);
}

void mask_chunk(Dtype dtype, const void* grad_y, const void* y, void* grad_x, int64_t begin, int64_t end, Isa isa,
                Stats* of_both) {
  const int64_t offset = begin * item_bytes(dtype);
  auto* mask = &baseline::mask_chunk;
#if defined(GRADPROBE_X86_LEVELS)
  if (isa == Isa::kAvx2) mask = &avx2::mask_chunk;
  if (isa == Isa::kAvx512) mask = &avx512::mask_chunk;
#endif
  (void)isa;
  mask(dtype, at(grad_y, offset), at(y, offset), at(grad_x, offset), end - begin, of_both);
}

}  // namespace gradprobe::cpu
