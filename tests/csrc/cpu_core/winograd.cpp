#include "winograd.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "cpu/winograd.h"

using namespace gradprobe::cpu;

namespace {

// Random floats in a heap block of the exact size.
std::unique_ptr<float[]> random_floats(int64_t n, std::mt19937_64& random) {
  std::unique_ptr<float[]> values(new float[n]);
  std::normal_distribution<float> normal;
  for (int64_t k = 0; k < n; ++k) values[k] = normal(random);
  return values;
}

// A convolution of one shape, block by block.
struct Case {
  Images images;
  int64_t in_channels, out_channels;
  Isa isa;

  int64_t n_pixels() const { return images.n_images * images.height * images.width; }

  int check(std::mt19937_64& random) const {
    const auto x = random_floats(n_pixels() * in_channels, random);
    const auto grad_y = random_floats(n_pixels() * out_channels, random);
    const auto filters = random_floats(out_channels * 9 * in_channels, random);
    const auto bias = random_floats(out_channels, random);
    std::vector<double> y(n_pixels() * out_channels), grad_x(n_pixels() * in_channels),
        grad_filters(out_channels * 9 * in_channels);
    for (int64_t pixel = 0; pixel < n_pixels(); ++pixel) {
      for (int64_t k = 0; k < out_channels; ++k) y[pixel * out_channels + k] = bias[k];
    }
    for_each_product([&](int64_t at_y, int64_t at_x, int64_t point) {
      for (int64_t k = 0; k < out_channels; ++k) {
        for (int64_t c = 0; c < in_channels; ++c) {
          const double filter = filters[(k * 9 + point) * in_channels + c], g = grad_y[at_y * out_channels + k],
                       value = x[at_x * in_channels + c];
          y[at_y * out_channels + k] += filter * value;
          grad_x[at_x * in_channels + c] += filter * g;
          grad_filters[(k * 9 + point) * in_channels + c] += g * value;
        }
      }
    });
    std::unique_ptr<float[]> transformed(new float[kPoints * filter_stride(in_channels, out_channels)]);
    std::unique_ptr<float[]> transposed(new float[9 * in_channels * out_channels]);
    transform_filters(filters.get(), in_channels, out_channels, isa, transposed.get(), transformed.get());
    int failures = compare("y", convolved(x.get(), transformed.get(), bias.get(), in_channels, out_channels), y);
    transform_rotated_filters(filters.get(), in_channels, out_channels, isa, transformed.get());
    failures += compare("the gradient of x",
                        convolved(grad_y.get(), transformed.get(), nullptr, out_channels, in_channels), grad_x);
    std::vector<float> sums(kPoints * filter_stride(in_channels, out_channels)),
        gradients(out_channels * 9 * in_channels);
    for_each_block([&](const Block& block) {
      const auto patches = room(in_channels), tiles = room(out_channels);
      transform_patches(images, x.get(), in_channels, block, isa, patches.get());
      transform_tiles(images, grad_y.get(), out_channels, block, isa, tiles.get());
      add_filter_products(tiles.get(), patches.get(), in_channels, out_channels, block.n_tiles, isa, sums.data());
    });
    write_filter_gradients(sums.data(), in_channels, out_channels, isa, gradients.data());
    return failures + compare("the gradient of the filters", gradients, grad_filters);
  }

  std::vector<float> convolved(const float* x, const float* transformed, const float* bias, int64_t from,
                               int64_t to) const {
    std::vector<float> y(n_pixels() * to, NAN);  // every pixel has to be written
    for_each_block([&](const Block& block) {
      const auto patches = room(from), products = room(to);
      transform_patches(images, x, from, block, isa, patches.get());
      multiply_filters(patches.get(), transformed, from, to, block.n_tiles, isa, products.get());
      write_tiles(images, products.get(), bias, to, block, isa, y.data());
    });
    return y;
  }

  // Memory for a block's patches or tiles; what was not written must not show in a result.
  static std::unique_ptr<float[]> room(int64_t n_channels) {
    const int64_t n = kPoints * point_stride(n_channels);
    std::unique_ptr<float[]> values(new float[n]);
    for (int64_t k = 0; k < n; ++k) values[k] = NAN;
    return values;
  }

  template <typename Each>
  void for_each_block(const Each& each) const {
    for (int64_t first = 0; first < images.n_tiles(); first += kBlockTiles) {
      each(Block{first, std::min(kBlockTiles, images.n_tiles() - first)});
    }
  }

  // Calls each(pixel of y, pixel of x, point of the filter).
  template <typename Each>
  void for_each_product(const Each& each) const {
    for (int64_t image = 0; image < images.n_images; ++image) {
      for (int64_t row = 0; row < images.height; ++row) {
        for (int64_t column = 0; column < images.width; ++column) {
          for (int64_t point = 0; point < 9; ++point) {
            const int64_t i = row + point / 3 - 1, j = column + point % 3 - 1;
            if (i < 0 || i >= images.height || j < 0 || j >= images.width) continue;
            const int64_t first = image * images.height * images.width;
            each(first + row * images.width + column, first + i * images.width + j, point);
          }
        }
      }
    }
  }

  int compare(const char* what, const std::vector<float>& found, const std::vector<double>& exact) const {
    double error = 0.0, size = 0.0;
    for (size_t k = 0; k < exact.size(); ++k) {
      const double off = found[k] - exact[k];
      error = off * off >= 0.0 ? error + off * off : INFINITY;
      size += exact[k] * exact[k];
    }
    if (error <= 1e-12 * size) return 0;
    std::printf("winograd, instruction set %d, %lld images of %lldx%lld, %lld to %lld channels: %s is off by %g\n",
                static_cast<int>(isa), static_cast<long long>(images.n_images), static_cast<long long>(images.height),
                static_cast<long long>(images.width), static_cast<long long>(in_channels),
                static_cast<long long>(out_channels), what, std::sqrt(error / size));
    return 1;
  }
};

}  // namespace

int check_winograd(Isa isa, std::mt19937_64& random) {
  int failures = 0;
  for (const Images& images : {Images{1, 1, 1}, Images{3, 2, 5}, Images{2, 7, 6}, Images{5, 11, 9}}) {
    failures += Case{images, 16, 16, isa}.check(random) + Case{images, 16, 48, isa}.check(random) +
                Case{images, 32, 16, isa}.check(random);
  }
  return failures + Case{{1, 3, 3}, 128, 64, isa}.check(random);
}
