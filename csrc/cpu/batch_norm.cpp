// Batch normalisation on the CPU, in the caller's flush mode, like torch's.
#include "cpu/batch_norm.h"

#include <cstddef>
#include <cstdint>

#include "core/half.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"

#define GRADPROBE_PER_ISA "cpu/batch_norm_loops.h"
#include "cpu/each_isa.h"

namespace gradprobe::cpu {

void moments_tile(const Matrix& matrix, const void* x, const Tile& tile, Isa isa, double* mean, double* sum_sq) {
  GRADPROBE_CHOOSE(isa, moments_of_tile)(matrix, x, tile, mean, sum_sq);
}

void normalise_tile(const Matrix& matrix, const void* x, const void* shortcut, void* y, const Tile& tile,
                    const float* mean, const float* scale, const float* bias, bool relu, Isa isa) {
  GRADPROBE_CHOOSE(isa, normalise_of_tile)(matrix, x, shortcut, y, tile, mean, scale, bias, relu);
}

void gradient_sums_tile(const Matrix& matrix, const void* grad_y, const void* y, const void* x, void* masked,
                        const Tile& tile, const float* mean, Isa isa, double* sum, double* dot) {
  GRADPROBE_CHOOSE(isa, gradient_sums_of_tile)(matrix, grad_y, y, x, masked, tile, mean, sum, dot);
}

void gradient_tile(const Matrix& matrix, const void* grad_y, const void* y, const void* x, void* grad_x,
                   const Tile& tile, const float* mean, const float* scale, const float* mean_g, const float* slope,
                   Isa isa) {
  GRADPROBE_CHOOSE(isa, gradient_of_tile)(matrix, grad_y, y, x, grad_x, tile, mean, scale, mean_g, slope);
}

}  // namespace gradprobe::cpu
