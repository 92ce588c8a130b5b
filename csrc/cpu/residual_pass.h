// One pass of the CPU kernels over a junction of a residual block, on torch's thread pool: memory that is dense and in
// the same order for all operands.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <vector>

#include "chunks.h"
#include "cpu/float_env.h"
#include "cpu/kernels.h"
#include "cpu/residual_add.h"
#include "stats.h"

namespace gradprobe::cpu {

// Calls each(chunk_number, chunk) for every chunk of a tensor.
template <typename Each>
void for_each_chunk(int64_t numel, const Each& each) {
  torch::stable::parallel_for(0, count_chunks(numel, kChunkNumel), 1, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) each(number, chunk_range(0, numel, 0, number, kChunkNumel));
  });
}

// The statistics of `n_rows` tensors, side by side for each chunk.
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

// y = x + f, or max(x + f, 0), and the statistics of y where `of_y` is not null.
inline void join(Dtype dtype, const void* x, const void* f, void* y, int64_t numel, bool relu, Partials* of_y) {
  const Isa isa = best_isa();
  for_each_chunk(numel, [&](int64_t number, const Chunk& chunk) {
    add_chunk(dtype, x, f, y, chunk.begin, chunk.end, relu, isa, of_y == nullptr ? nullptr : of_y->of_chunk(number));
  });
}

// grad_x, which is grad_y where y lets it through or where y is null, and the statistics of grad_y and of grad_x where
// `of_both` is not null.
inline void mask(Dtype dtype, const void* grad_y, const void* y, void* grad_x, int64_t numel, Partials* of_both) {
  const Isa isa = best_isa();
  for_each_chunk(numel, [&](int64_t number, const Chunk& chunk) {
    mask_chunk(dtype, grad_y, y, grad_x, chunk.begin, chunk.end, isa,
               of_both == nullptr ? nullptr : of_both->of_chunk(number));
  });
}

// The raw row of total - part; and one with the sum of part * (total - part) in the column of sums, else zero.
inline void branch(Dtype dtype, const void* total, const void* part, int64_t numel, double* row, double* dot_row) {
  const Isa isa = best_isa();
  Partials partials(numel, 1);
  std::vector<double> dots(count_chunks(numel, kChunkNumel));
  for_each_chunk(numel, [&](int64_t number, const Chunk& chunk) {
    const FloatEnvironment environment;
    *partials.of_chunk(number) = branch_chunk(dtype, total, part, chunk.begin, chunk.end, isa, &dots[number]);
  });
  partials.finish_row(0, row);
  const FloatEnvironment environment;
  Stats products = identity();
  for (const double dot : dots) products.sum += dot;
  finish(products, dot_row);
}

}  // namespace gradprobe::cpu
