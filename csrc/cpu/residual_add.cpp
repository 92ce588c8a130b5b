// The residual add on the CPU. A chunk is computed in the caller's flush mode, like torch's add and relu. Its
// statistics come from registers or from cache, so each operand is read from main memory once, and count subnormal
// numbers in either mode.
#include "cpu/residual_add.h"

#include <cstdint>

#include "core/half.h"
#include "core/stats.h"
#include "cpu/float_env.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"

#define GRADPROBE_PER_ISA "cpu/residual_loops.h"
#include "cpu/each_isa.h"

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
  const auto join = GRADPROBE_CHOOSE(isa, join_chunk);
  join(dtype, at(x, offset), at(f, offset), at(y, offset), end - begin, relu, of_y);
}

void mask_chunk(Dtype dtype, const void* grad_y, const void* y, void* grad_x, int64_t begin, int64_t end, Isa isa,
                Stats* of_both) {
  const int64_t offset = begin * item_bytes(dtype);
  const auto mask = GRADPROBE_CHOOSE(isa, mask_chunk);
  mask(dtype, at(grad_y, offset), at(y, offset), at(grad_x, offset), end - begin, of_both);
}

Stats branch_chunk(Dtype dtype, const void* branch, const void* shortcut, int64_t begin, int64_t end, Isa isa,
                   double* dot) {
  const int64_t offset = begin * item_bytes(dtype);
  const auto of_branch = GRADPROBE_CHOOSE(isa, branch_chunk);
  return of_branch(dtype, at(branch, offset), at(shortcut, offset), end - begin, dot);
}

}  // namespace gradprobe::cpu
