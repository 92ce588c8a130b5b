// Runs the CPU kernels of the residual add over whole tensors, on a thread pool. All operands are dense and in the same
// order.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "core/chunks.h"
#include "core/stats.h"
#include "cpu/float_env.h"
#include "cpu/kernels.h"
#include "cpu/residual_add.h"
#include "cpu/threads.h"

namespace gradprobe::cpu {

// Calls each(chunk_number, chunk) for every chunk of a tensor.
template <typename Each>
void for_each_chunk(int64_t numel, const Each& each) {
  parallel_for(count_chunks(numel, kChunkNumel), [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) each(number, chunk_range(0, numel, 0, number, kChunkNumel));
  });
}

// Statistics by chunk of `n_rows` tensors of the same size: [n_chunks, n_rows].
class Partials {
 public:
  Partials(int64_t numel, int64_t n_rows) : n_rows_(n_rows), stats_(n_rows * count_chunks(numel, kChunkNumel)) {}

  Stats* of_chunk(int64_t number) { return &stats_[n_rows_ * number]; }

  // Writes the raw row of tensor k.
  void finish_row(int64_t k, double* row) const {
    const FloatEnvironment environment;
    Stats stats = identity();
    for (size_t at = k; at < stats_.size(); at += n_rows_) stats = merge(stats, stats_[at]);
    finish(stats, row);
  }

 private:
  int64_t n_rows_;
  std::vector<Stats> stats_;
};

// Computes y = x + f, or max(x + f, 0), and the statistics of y unless `of_y` is null.
inline void join(Dtype dtype, const void* x, const void* f, void* y, int64_t numel, bool relu, Partials* of_y) {
  const Isa isa = best_isa();
  for_each_chunk(numel, [&](int64_t number, const Chunk& chunk) {
    add_chunk(dtype, x, f, y, chunk.begin, chunk.end, relu, isa, of_y == nullptr ? nullptr : of_y->of_chunk(number));
  });
}

// Computes grad_x, which is grad_y masked by the ReLU of y, or a copy if y is null, and the statistics of grad_y and
// grad_x unless `of_both` is null.
inline void mask(Dtype dtype, const void* grad_y, const void* y, void* grad_x, int64_t numel, Partials* of_both) {
  const Isa isa = best_isa();
  for_each_chunk(numel, [&](int64_t number, const Chunk& chunk) {
    mask_chunk(dtype, grad_y, y, grad_x, chunk.begin, chunk.end, isa,
               of_both == nullptr ? nullptr : of_both->of_chunk(number));
  });
}

// Writes the raw row of the branch's part of the gradient, and a second row with the sum of branch * shortcut in the
// column of squares. The second row's abs_max says how the sum is scaled: of float64 operands it may exceed a double's
// range.
inline void branch(Dtype dtype, const void* branch, const void* shortcut, int64_t numel, double* row, double* dot_row) {
  const Isa isa = best_isa();
  const bool is_wide = dtype == Dtype::kFloat64;
  Partials partials(numel, is_wide ? 2 : 1);
  std::vector<double> dots(count_chunks(numel, kChunkNumel));
  for_each_chunk(numel, [&](int64_t number, const Chunk& chunk) {
    const FloatEnvironment environment;
    Stats* stats = partials.of_chunk(number);
    stats[0] = branch_chunk(dtype, branch, shortcut, chunk.begin, chunk.end, isa, &dots[number]);
    if (is_wide) stats[1] = chunk_stats({shortcut, dtype, numel, nullptr}, chunk.begin, chunk.end, isa);
  });
  partials.finish_row(0, row);
  const FloatEnvironment environment;
  int exponent = 0;
  if (is_wide) {
    double shortcut_row[kStats];
    partials.finish_row(1, shortcut_row);
    exponent = range_exponent(std::sqrt(row[kAbsMax]) * std::sqrt(shortcut_row[kAbsMax]));
  }
  if (exponent != 0) {
    const double factor = std::ldexp(1.0, -exponent);
    const auto *a = static_cast<const double*>(branch), *b = static_cast<const double*>(shortcut);
    for_each_chunk(numel, [&](int64_t number, const Chunk& chunk) {
      const FloatEnvironment environment;
      dots[number] = 0.0;
      for (int64_t i = chunk.begin; i < chunk.end; ++i) dots[number] += (a[i] * factor) * (b[i] * factor);
    });
  }
  Stats products = identity();
  for (const double dot : dots) products.sum_sq += dot;
  products.abs_max = std::ldexp(1.0, exponent);
  finish(products, dot_row);
}

}  // namespace gradprobe::cpu
