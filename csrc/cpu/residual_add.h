// The junction of a residual block on the CPU: raw pointers in, a chunk of the result and its statistics out. No torch,
// no threads: residual_pass.h brings the latter.
#pragma once

#include <cstdint>

#include "core/stats.h"
#include "cpu/kernels.h"

namespace gradprobe::cpu {

// Elements [begin, end) of y = x + f, or max(x + f, 0), with end - begin <= kChunkNumel; operands are dense memory, in
// the same order. `of_y` gets the statistics of the chunk, unless null; where it is null, y may be x or f.
void add_chunk(Dtype dtype, const void* x, const void* f, void* y, int64_t begin, int64_t end, bool relu, Isa isa,
               Stats* of_y);

// Elements [begin, end) of grad_x = grad_y where y > 0 or y is NaN, else 0; a copy of grad_y where y is null. `of_both`
// gets the statistics of the chunk of grad_y and of grad_x, unless null.
void mask_chunk(Dtype dtype, const void* grad_y, const void* y, void* grad_x, int64_t begin, int64_t end, Isa isa,
                Stats* of_both);

// Statistics of elements [begin, end) of branch; `dot` gets the sum of branch * shortcut. Needs a FloatEnvironment in
// force.
Stats branch_chunk(Dtype dtype, const void* branch, const void* shortcut, int64_t begin, int64_t end, Isa isa,
                   double* dot);

}  // namespace gradprobe::cpu
