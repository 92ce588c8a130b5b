// Runs batch normalisation over whole tensors on a thread pool. All tensors of one call are dense matrices [n_rows,
// n_channels]; sums are taken by tile and merged in a fixed order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/batch_norm.h"
#include "cpu/kernels.h"
#include "cpu/threads.h"

namespace gradprobe::cpu {

// The most channels of a tile, and its elements: 64 KiB of float32.
inline constexpr int64_t kTileChannels = 256;
inline constexpr int64_t kTileNumel = 16384;
// Up to this many tiles, waking other threads costs more than it saves.
inline constexpr int64_t kSerialTiles = 2;

// The tiles of a matrix: n_bands bands of rows, each of n_strips strips of channels.
class Tiles {
 public:
  explicit Tiles(const Matrix& matrix)
      : matrix_(matrix),
        band_(std::max<int64_t>(1, kTileNumel / std::min(matrix.n_channels, kTileChannels))),
        n_strips_((matrix.n_channels + kTileChannels - 1) / kTileChannels),
        n_bands((matrix.n_rows + band_ - 1) / band_) {}

  // Calls each(band, tile) for every tile.
  template <typename Each>
  void for_each(const Each& each) const {
    const auto run = [&](int64_t begin, int64_t end) {
      for (int64_t number = begin; number < end; ++number) {
        const int64_t band = number / n_strips_, row = band * band_, channel = number % n_strips_ * kTileChannels;
        each(band, Tile{row, std::min(band_, matrix_.n_rows - row), channel,
                        std::min(kTileChannels, matrix_.n_channels - channel)});
      }
    };
    const int64_t n_tiles = n_bands * n_strips_;
    if (n_tiles <= kSerialTiles) return run(0, n_tiles);
    parallel_for(n_tiles, run);
  }

  int64_t n_rows(int64_t band) const { return std::min(band_, matrix_.n_rows - band * band_); }

 private:
  Matrix matrix_;
  int64_t band_;
  int64_t n_strips_;

 public:
  const int64_t n_bands;
};

// The parameters of a batch normalisation, [n_channels] each; running_mean and running_var may be null.
struct Norm {
  const float* weight;
  const float* bias;
  float* running_mean;
  float* running_var;
  double momentum;
  double eps;
};

// Computes y = batch_norm(x) [+ shortcut], and max(y, 0) if `relu`; shortcut may be null. Updates the running
// statistics. `saved` [2, n_channels] gets the means and the inverse standard deviations.
inline void batch_norm(const Matrix& matrix, const void* x, const void* shortcut, void* y, const Norm& norm, bool relu,
                       float* saved) {
  const Isa isa = best_isa();
  const Tiles tiles(matrix);
  const int64_t n_channels = matrix.n_channels;
  std::vector<double> means(tiles.n_bands * n_channels), sums_sq(tiles.n_bands * n_channels);  // [n_bands, n_channels]
  tiles.for_each([&](int64_t band, const Tile& tile) {
    const int64_t at = band * n_channels + tile.channel;
    moments_tile(matrix, x, tile, isa, &means[at], &sums_sq[at]);
  });
  const auto n_rows = static_cast<double>(matrix.n_rows);
  float *mean = saved, *invstd = saved + n_channels;
  std::vector<float> scale(n_channels);
  for (int64_t c = 0; c < n_channels; ++c) {
    double sum = 0.0, sum_sq = 0.0;
    for (int64_t band = 0; band < tiles.n_bands; ++band) {
      sum += means[band * n_channels + c] * static_cast<double>(tiles.n_rows(band));
    }
    const double of_all = sum / n_rows;
    for (int64_t band = 0; band < tiles.n_bands; ++band) {
      const double off = means[band * n_channels + c] - of_all;
      sum_sq += sums_sq[band * n_channels + c] + off * off * static_cast<double>(tiles.n_rows(band));
    }
    mean[c] = static_cast<float>(of_all);
    invstd[c] = static_cast<float>(1.0 / std::sqrt(sum_sq / n_rows + norm.eps));
    scale[c] = norm.weight[c] * invstd[c];
    const auto update = [&](float* running, double value) {
      if (running != nullptr) {
        running[c] = static_cast<float>(norm.momentum * value + (1.0 - norm.momentum) * running[c]);
      }
    };
    update(norm.running_mean, of_all);
    update(norm.running_var, sum_sq / (n_rows - 1.0));
  }
  tiles.for_each([&](int64_t, const Tile& tile) {
    normalise_tile(matrix, x, shortcut, y, tile, mean, scale.data(), norm.bias, relu, isa);
  });
}

// Computes the gradients of batch_norm(). y: the result if there was a ReLU, else null. `masked`: unless null, gets the
// gradient of the shortcut, which without a ReLU is grad_y itself.
inline void batch_norm_backward(const Matrix& matrix, const void* grad_y, const void* y, const void* x,
                                const float* weight, const float* saved, void* grad_x, void* masked, float* grad_weight,
                                float* grad_bias) {
  const Isa isa = best_isa();
  const Tiles tiles(matrix);
  const int64_t n_channels = matrix.n_channels;
  const float *mean = saved, *invstd = saved + n_channels;
  std::vector<double> sums(tiles.n_bands * n_channels), dots(tiles.n_bands * n_channels);  // [n_bands, n_channels]
  tiles.for_each([&](int64_t band, const Tile& tile) {
    const int64_t at = band * n_channels + tile.channel;
    gradient_sums_tile(matrix, grad_y, y, x, masked, tile, mean, isa, &sums[at], &dots[at]);
  });
  const auto n_rows = static_cast<double>(matrix.n_rows);
  std::vector<float> coefficients(3 * n_channels);
  float *scale = coefficients.data(), *mean_g = scale + n_channels, *slope = mean_g + n_channels;
  for (int64_t c = 0; c < n_channels; ++c) {
    double sum = 0.0, dot = 0.0;
    for (int64_t band = 0; band < tiles.n_bands; ++band) {
      sum += sums[band * n_channels + c];
      dot += dots[band * n_channels + c];
    }
    const double normalised = dot * invstd[c];
    grad_bias[c] = static_cast<float>(sum);
    grad_weight[c] = static_cast<float>(normalised);
    scale[c] = weight[c] * invstd[c];
    mean_g[c] = static_cast<float>(sum / n_rows);
    slope[c] = static_cast<float>(normalised * invstd[c] / n_rows);
  }
  // A masked gradient that has been stored is not masked again.
  const bool is_stored = y != nullptr && masked != nullptr;
  tiles.for_each([&](int64_t, const Tile& tile) {
    gradient_tile(matrix, is_stored ? masked : grad_y, is_stored ? nullptr : y, x, grad_x, tile, mean, scale, mean_g,
                  slope, isa);
  });
}

}  // namespace gradprobe::cpu
