// Convolutions with 3x3 filters, stride 1 and a padding of 1 on the CPU, by Winograd's F(2x2, 3x3): an output tile of
// 2x2 takes 16 products per pair of channels instead of 36. Raw pointers in, one block of tiles out; winograd_pass.h
// runs these functions on whole tensors.
//
//     y = A^T [(G g G^T) * (B^T d B)] A    d: a patch of x [4, 4], g: a filter [3, 3], y: a tile of the result [2, 2]
//
// All transforms are linear, so the gradient of a filter is G^T [sum of (A grad_y A^T) * (B^T d B)] G, and that of x is
// a convolution with rotated filters.
//
// Source: Lavin and Gray 2015, "Fast algorithms for convolutional neural networks" (arXiv 1509.09308), section 4.1.
//
// Tensors are float32 with the channels innermost: x [n_images, height, width, in_channels], y likewise, filters
// [out_channels, 3, 3, in_channels].
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernels.h"

namespace gradprobe::cpu {

// Numbers of channels must be multiples of this.
inline constexpr int64_t kChannelStep = 16;
// With more channels the transformed filters leave the cache, and torch's convolution is as fast.
inline constexpr int64_t kMostChannels = 128;
// With 16 channels on both sides, the transforms of larger images take longer than the saved products.
inline constexpr int64_t kMostPixelsOfFewChannels = 256;
// Points of a transformed patch, tile or filter.
inline constexpr int kPoints = 16;
// The most tiles of a block, a thread's unit of work.
inline constexpr int64_t kBlockTiles = 32;

struct Images {
  int64_t n_images;
  int64_t height;
  int64_t width;

  int64_t tile_rows() const { return (height + 1) / 2; }
  int64_t tile_columns() const { return (width + 1) / 2; }
  int64_t n_tiles() const { return n_images * tile_rows() * tile_columns(); }
};

// Whether these functions take a shape, and are worth while.
inline bool is_suitable(const Images& images, int64_t in_channels, int64_t out_channels) {
  const int64_t fewest = std::min(in_channels, out_channels), most = std::max(in_channels, out_channels);
  if (in_channels % kChannelStep != 0 || out_channels % kChannelStep != 0 || most > kMostChannels) return false;
  return fewest > 0 && (most > kChannelStep || images.height * images.width <= kMostPixelsOfFewChannels);
}

// Tiles [first, first + n_tiles) of the images.
struct Block {
  int64_t first;
  int64_t n_tiles;
};

// The distance of two points of a block's patches or tiles, [kPoints, kBlockTiles, n_channels]. The extra cache line
// keeps the points of a tile in different sets of the cache.
constexpr int64_t point_stride(int64_t n_channels) { return kBlockTiles * n_channels + 16; }

// The same for filters [kPoints, in_channels, out_channels] or [kPoints, out_channels, in_channels].
constexpr int64_t filter_stride(int64_t in_channels, int64_t out_channels) { return in_channels * out_channels + 16; }

// Writes G g G^T of all filters, [kPoints, in_channels, out_channels]. `transposed` is room for all filters.
void transform_filters(const float* filters, int64_t in_channels, int64_t out_channels, Isa isa, float* transposed,
                       float* transformed);

// Writes G g G^T of the filters that the gradient of x is convolved with, [kPoints, out_channels, in_channels].
void transform_rotated_filters(const float* filters, int64_t in_channels, int64_t out_channels, Isa isa,
                               float* transformed);

// Writes B^T d B of the block's patches.
void transform_patches(const Images& images, const float* x, int64_t n_channels, const Block& block, Isa isa,
                       float* patches);

// Writes A g A^T of the block's tiles of a gradient.
void transform_tiles(const Images& images, const float* grad_y, int64_t n_channels, const Block& block, Isa isa,
                     float* tiles);

// Writes the products of patches and filters, summed over the input channels, for each tile of a block.
void multiply_filters(const float* patches, const float* transformed, int64_t in_channels, int64_t out_channels,
                      int64_t n_tiles, Isa isa, float* products);

// Writes A^T m A + bias of the block's products; bias [n_channels] may be null.
void write_tiles(const Images& images, const float* products, const float* bias, int64_t n_channels, const Block& block,
                 Isa isa, float* y);

// Adds the products of a block's gradients and patches to sums [kPoints, out_channels, in_channels].
void add_filter_products(const float* tiles, const float* patches, int64_t in_channels, int64_t out_channels,
                         int64_t n_tiles, Isa isa, float* sums);

// Writes G^T s G of the sums: the gradients of the filters.
void write_filter_gradients(const float* sums, int64_t in_channels, int64_t out_channels, Isa isa, float* gradients);

}  // namespace gradprobe::cpu
