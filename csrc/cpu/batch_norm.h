// Batch normalisation in training, fused with a residual add and a ReLU, on the CPU: raw pointers in, one tile of the
// result out. batch_norm_pass.h runs these functions on whole tensors.
//
// A tensor whose channels are innermost in memory is a matrix [n_rows, n_channels]: a row for each position of each
// image. Elements are float32 or bfloat16, everything else float32.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace gradprobe::cpu {

// A part of the matrix, a thread's unit of work. All of a matrix's tiles but the last ones are of the same size, so
// results do not depend on the number of threads.
struct Tile {
  int64_t row;
  int64_t n_rows;
  int64_t channel;
  int64_t n_channels;
};

// A matrix's elements and the distance of its rows.
struct Matrix {
  Dtype dtype;
  int64_t n_rows;
  int64_t n_channels;
};

// Writes the mean and the sum of squared deviations from it of each channel of the tile, [n_channels] each.
void moments_tile(const Matrix& matrix, const void* x, const Tile& tile, Isa isa, double* mean, double* sum_sq);

// Computes y = (x - mean) * scale + bias [+ shortcut], and max(y, 0) if `relu`; shortcut may be null. The normalised x
// is rounded to the dtype before it is added to the shortcut, as if it had been stored. mean, scale, bias: [n_channels]
// of the matrix.
void normalise_tile(const Matrix& matrix, const void* x, const void* shortcut, void* y, const Tile& tile,
                    const float* mean, const float* scale, const float* bias, bool relu, Isa isa);

// Writes the sums of g and of g * (x - mean) of each channel of the tile, [n_channels] each. g is grad_y where y > 0 or
// y is NaN, else 0; grad_y itself if y is null. `masked`, unless null, gets g.
void gradient_sums_tile(const Matrix& matrix, const void* grad_y, const void* y, const void* x, void* masked,
                        const Tile& tile, const float* mean, Isa isa, double* sum, double* dot);

// Computes grad_x = scale * (g - mean_g - (x - mean) * slope) with g as above.
void gradient_tile(const Matrix& matrix, const void* grad_y, const void* y, const void* x, void* grad_x,
                   const Tile& tile, const float* mean, const float* scale, const float* mean_g, const float* slope,
                   Isa isa);

}  // namespace gradprobe::cpu
