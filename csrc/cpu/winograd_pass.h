// Runs Winograd's convolution over whole tensors on a thread pool. Sums are taken in an order that depends on the shape
// alone, so results are the same for any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/threads.h"
#include "cpu/winograd.h"

namespace gradprobe::cpu {

// Up to this many blocks, waking other threads costs more than it saves.
inline constexpr int64_t kSerialBlocks = 4;
// Blocks whose products are added up by one thread, and the most such groups.
inline constexpr int64_t kGroupBlocks = 16;
inline constexpr int64_t kMostGroups = 8;

// Memory that a thread keeps from call to call: fresh memory would cost a page fault per 4 KiB. The last block's values
// stay in it.
class Scratch {
 public:
  enum Use { kPatches, kTiles, kTransposed, kFilters, kUses };

  static float* of_thread(Use use, int64_t numel) {
    thread_local std::vector<float> buffers[kUses];
    std::vector<float>& buffer = buffers[use];
    if (static_cast<int64_t>(buffer.size()) < numel) buffer.resize(numel);
    return buffer.data();
  }
};

// The blocks of all images' tiles.
class Blocks {
 public:
  Blocks(const Images& images, int64_t size) : n_tiles_(images.n_tiles()), size_(size) {}

  int64_t count() const { return (n_tiles_ + size_ - 1) / size_; }

  Block operator[](int64_t number) const {
    const int64_t first = number * size_;
    return {first, std::min(size_, n_tiles_ - first)};
  }

 private:
  int64_t n_tiles_, size_;
};

// Writes y [images, out_channels] from x [images, in_channels] and transformed filters; bias may be null.
inline void convolve_transformed(const Images& images, const float* x, const float* transformed, const float* bias,
                                 int64_t in_channels, int64_t out_channels, Isa isa, float* y) {
  // With few channels, half a block's patches and products stay in a cache of 48 KiB.
  const Blocks blocks(images, std::max(in_channels, out_channels) > kChannelStep ? kBlockTiles : kBlockTiles / 2);
  const auto run = [&](int64_t begin, int64_t end) {
    float* patches = Scratch::of_thread(Scratch::kPatches, kPoints * point_stride(in_channels));
    float* products = Scratch::of_thread(Scratch::kTiles, kPoints * point_stride(out_channels));
    for (int64_t number = begin; number < end; ++number) {
      const Block block = blocks[number];
      transform_patches(images, x, in_channels, block, isa, patches);
      multiply_filters(patches, transformed, in_channels, out_channels, block.n_tiles, isa, products);
      write_tiles(images, products, bias, out_channels, block, isa, y);
    }
  };
  if (blocks.count() <= kSerialBlocks) return run(0, blocks.count());
  parallel_for(blocks.count(), run);
}

// Writes y [images, out_channels] from x [images, in_channels] and filters [out_channels, 3, 3, in_channels]; bias may
// be null.
inline void convolve(const Images& images, const float* x, const float* filters, const float* bias, int64_t in_channels,
                     int64_t out_channels, float* y) {
  const Isa isa = best_isa();
  float* transformed = Scratch::of_thread(Scratch::kFilters, kPoints * filter_stride(in_channels, out_channels));
  float* transposed = Scratch::of_thread(Scratch::kTransposed, 9 * in_channels * out_channels);
  transform_filters(filters, in_channels, out_channels, isa, transposed, transformed);
  convolve_transformed(images, x, transformed, bias, in_channels, out_channels, isa, y);
}

// Writes the gradient of x.
inline void convolve_backward_input(const Images& images, const float* grad_y, const float* filters,
                                    int64_t in_channels, int64_t out_channels, float* grad_x) {
  const Isa isa = best_isa();
  float* transformed = Scratch::of_thread(Scratch::kFilters, kPoints * filter_stride(in_channels, out_channels));
  transform_rotated_filters(filters, in_channels, out_channels, isa, transformed);
  convolve_transformed(images, grad_y, transformed, nullptr, out_channels, in_channels, isa, grad_x);
}

// Writes the gradient of the filters.
inline void convolve_backward_filters(const Images& images, const float* grad_y, const float* x, int64_t in_channels,
                                      int64_t out_channels, float* gradients) {
  const Isa isa = best_isa();
  const Blocks blocks(images, kBlockTiles);
  const int64_t n_blocks = blocks.count(), numel = kPoints * filter_stride(in_channels, out_channels);
  const int64_t n_groups = std::clamp<int64_t>(n_blocks / kGroupBlocks, 1, kMostGroups);
  float* sums = Scratch::of_thread(Scratch::kFilters, n_groups * numel);  // [n_groups, kPoints, out, in]
  const auto run = [&](int64_t begin, int64_t end) {
    float* patches = Scratch::of_thread(Scratch::kPatches, kPoints * point_stride(in_channels));
    float* tiles = Scratch::of_thread(Scratch::kTiles, kPoints * point_stride(out_channels));
    for (int64_t group = begin; group < end; ++group) {
      float* of_group = sums + group * numel;
      std::fill_n(of_group, numel, 0.0f);
      for (int64_t number = n_blocks * group / n_groups; number < n_blocks * (group + 1) / n_groups; ++number) {
        const Block block = blocks[number];
        transform_patches(images, x, in_channels, block, isa, patches);
        transform_tiles(images, grad_y, out_channels, block, isa, tiles);
        add_filter_products(tiles, patches, in_channels, out_channels, block.n_tiles, isa, of_group);
      }
    }
  };
  if (n_groups == 1) {
    run(0, 1);
  } else {
    parallel_for(n_groups, run);
  }
  for (int64_t group = 1; group < n_groups; ++group) {
    for (int64_t k = 0; k < numel; ++k) sums[k] += sums[group * numel + k];
  }
  write_filter_gradients(sums, in_channels, out_channels, isa, gradients);
}

}  // namespace gradprobe::cpu
