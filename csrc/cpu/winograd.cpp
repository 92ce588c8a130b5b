// Winograd's convolution on the CPU, in the caller's flush mode, like torch's.
#include "cpu/winograd.h"

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/kernels.h"

#define GRADPROBE_PER_ISA "cpu/winograd_loops.h"
#include "cpu/each_isa.h"

namespace gradprobe::cpu {

void transform_filters(const float* filters, int64_t in_channels, int64_t out_channels, Isa isa, float* transposed,
                       float* transformed) {
  GRADPROBE_CHOOSE(isa, filters_transformed)(filters, in_channels, out_channels, transposed, transformed);
}

void transform_rotated_filters(const float* filters, int64_t in_channels, int64_t out_channels, Isa isa,
                               float* transformed) {
  GRADPROBE_CHOOSE(isa, rotated_filters_transformed)(filters, in_channels, out_channels, transformed);
}

void transform_patches(const Images& images, const float* x, int64_t n_channels, const Block& block, Isa isa,
                       float* patches) {
  GRADPROBE_CHOOSE(isa, patches_transformed)(images, x, n_channels, block, patches);
}

void transform_tiles(const Images& images, const float* grad_y, int64_t n_channels, const Block& block, Isa isa,
                     float* tiles) {
  GRADPROBE_CHOOSE(isa, tiles_transformed)(images, grad_y, n_channels, block, tiles);
}

void multiply_filters(const float* patches, const float* transformed, int64_t in_channels, int64_t out_channels,
                      int64_t n_tiles, Isa isa, float* products) {
  GRADPROBE_CHOOSE(isa, filters_multiplied)(patches, transformed, in_channels, out_channels, n_tiles, products);
}

void write_tiles(const Images& images, const float* products, const float* bias, int64_t n_channels, const Block& block,
                 Isa isa, float* y) {
  GRADPROBE_CHOOSE(isa, tiles_written)(images, products, bias, n_channels, block, y);
}

void add_filter_products(const float* tiles, const float* patches, int64_t in_channels, int64_t out_channels,
                         int64_t n_tiles, Isa isa, float* sums) {
  GRADPROBE_CHOOSE(isa, filter_products_added)(tiles, patches, in_channels, out_channels, n_tiles, sums);
}

void write_filter_gradients(const float* sums, int64_t in_channels, int64_t out_channels, Isa isa, float* gradients) {
  GRADPROBE_CHOOSE(isa, filter_gradients_written)(sums, in_channels, out_channels, gradients);
}

}  // namespace gradprobe::cpu
