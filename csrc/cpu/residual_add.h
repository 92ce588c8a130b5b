// The residual add on the CPU, forward and backward: raw pointers in, a chunk of the result and its statistics out.
// residual_pass.h runs these functions on whole tensors.
#pragma once

#include <cstdint>

#include "core/stats.h"
#include "cpu/kernels.h"

namespace gradprobe::cpu {

// Computes elements [begin, end) of y = x + f, or max(x + f, 0), with end - begin <= kChunkNumel. Operands are dense
// and in the same order. `of_y` gets the statistics of the chunk unless it is null; only then may y be x or f.
void add_chunk(Dtype dtype, const void* x, const void* f, void* y, int64_t begin, int64_t end, bool relu, Isa isa,
               Stats* of_y);

// Computes elements [begin, end) of grad_x: grad_y where y > 0 or y is NaN, else 0; a copy of grad_y if y is null.
// `of_both` [2] gets the statistics of the chunks of grad_y and grad_x unless it is null.
void mask_chunk(Dtype dtype, const void* grad_y, const void* y, void* grad_x, int64_t begin, int64_t end, Isa isa,
                Stats* of_both);

// Returns the statistics of elements [begin, end) of branch; `dot` gets the sum of branch * shortcut. Requires a
// FloatEnvironment.
Stats branch_chunk(Dtype dtype, const void* branch, const void* shortcut, int64_t begin, int64_t end, Isa isa,
                   double* dot);

}  // namespace gradprobe::cpu
