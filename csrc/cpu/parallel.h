// Runs the CPU kernels over the chunks of many tensors, on a thread pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/chunks.h"
#include "core/layout.h"
#include "core/magnitudes.h"
#include "core/stats.h"
#include "cpu/float_env.h"
#include "cpu/kernels.h"
#include "cpu/threads.h"

namespace gradprobe::cpu {

// Up to this many elements in total, waking other threads costs more than it saves.
inline constexpr int64_t kSerialNumel = 65536;
// The cost of starting on a tensor, in elements.
inline constexpr int64_t kTensorNumel = 256;

// The tensors of a pass, and their chunks.
class Work {
 public:
  explicit Work(int64_t n_tensors) {
    views_.reserve(n_tensors);
    first_chunk_.reserve(n_tensors + 1);
    first_chunk_.push_back(0);
  }

  // Adds a tensor. dims: from reduce_dims() if it is not contiguous, else null.
  void add(const void* data, Dtype dtype, int64_t numel, const Dims* dims = nullptr) {
    const bool is_needed = dims != nullptr && !dims->dense();
    const Dims* kept = is_needed ? dims_.emplace_back(std::make_unique<Dims>(*dims)).get() : nullptr;
    views_.push_back({data, dtype, numel, kept});
    first_chunk_.push_back(n_chunks() + count_chunks(numel, kChunkNumel));
    cost_numel_ += numel + kTensorNumel;
  }

  const std::vector<View>& views() const { return views_; }
  int64_t n_tensors() const { return static_cast<int64_t>(views_.size()); }
  int64_t first_chunk(int64_t k) const { return first_chunk_[k]; }  // k <= n_tensors()
  int64_t n_chunks() const { return first_chunk_.back(); }

  // Calls each(chunk_number, chunk) for every chunk, on the pool's threads, with an `Environment` alive on each thread.
  // Each thread has a share of the chunks and helps with the others' shares when its own is done.
  template <typename Environment, typename Each>
  void for_each_chunk(const Each& each) const {
    const auto run = [&](int64_t begin, int64_t end) {
      const Environment environment;
      int64_t k = find_tensor(first_chunk_.data(), n_tensors(), begin);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        while (first_chunk_[k + 1] <= chunk) ++k;
        each(chunk, chunk_range(k, views_[k].numel, first_chunk_[k], chunk, kChunkNumel));
      }
    };
    if (n_chunks() == 0) return;
    const int64_t n_threads = count_threads();
    if (n_threads == 1 || n_chunks() == 1 || cost_numel_ <= kSerialNumel) return run(0, n_chunks());
    const int64_t batch = std::max<int64_t>(1, n_chunks() * kChunkNumel / cost_numel_);
    // A thread's own share is what torch's operators have probably left in its cache, if they have just written a
    // tensor.
    std::vector<Share> shares(n_threads);
    for (int64_t t = 0; t < n_threads; ++t) {
      shares[t].next = n_chunks() * t / n_threads;
      shares[t].end = n_chunks() * (t + 1) / n_threads;
    }
    parallel_for(n_threads, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t k = 0; k < n_threads; ++k) {
          Share& share = shares[(t + k) % n_threads];
          for (int64_t at; (at = share.next.fetch_add(batch, std::memory_order_relaxed)) < share.end;) {
            run(at, std::min(at + batch, share.end));
          }
        }
      }
    });
  }

 private:
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };

  std::vector<View> views_;
  std::vector<std::unique_ptr<const Dims>> dims_;  // views_ points to them
  std::vector<int64_t> first_chunk_;
  int64_t cost_numel_ = 0;
};

// Writes the raw rows [n_tensors, kStats] of all tensors.
inline void grad_stats(const Work& work, double* rows) {
  const Isa isa = best_isa();
  std::vector<Stats> partials(work.n_chunks());
  work.for_each_chunk<FloatEnvironment>([&](int64_t number, const Chunk& chunk) {
    partials[number] = chunk_stats(work.views()[chunk.tensor], chunk.begin, chunk.end, isa);
  });
  const FloatEnvironment environment;
  for (int64_t k = 0; k < work.n_tensors(); ++k) {
    Stats stats = identity();
    for (int64_t chunk = work.first_chunk(k); chunk < work.first_chunk(k + 1); ++chunk)
      stats = merge(stats, partials[chunk]);
    finish(stats, rows + k * kStats);
  }
}

// Writes the rows of magnitudes [n_tensors, kMagnitudeColumns] of all tensors.
inline void magnitudes(const Work& work, double* rows) {
  std::vector<int64_t> counts(work.n_tensors() * kCounts);
  std::vector<Moments> partials(work.n_chunks());
  work.for_each_chunk<FloatEnvironment>([&](int64_t number, const Chunk& chunk) {
    int64_t of_chunk[kCounts] = {};
    partials[number] = count_magnitudes(work.views()[chunk.tensor], chunk.begin, chunk.end, of_chunk);
    // integers, so the order in which threads add them does not matter
    for (int bin = 0; bin < kCounts; ++bin) {
      if (of_chunk[bin] == 0) continue;
      __atomic_fetch_add(&counts[chunk.tensor * kCounts + bin], of_chunk[bin], __ATOMIC_RELAXED);
    }
  });
  const FloatEnvironment environment;
  for (int64_t k = 0; k < work.n_tensors(); ++k) {
    Moments whole = no_moments();
    for (int64_t chunk = work.first_chunk(k); chunk < work.first_chunk(k + 1); ++chunk)
      whole = merge(whole, partials[chunk]);
    double* row = rows + k * kMagnitudeColumns;
    for (int bin = 0; bin < kCounts; ++bin) row[bin] = static_cast<double>(counts[k * kCounts + bin]);
    finish(whole, row);
  }
}

}  // namespace gradprobe::cpu
