// Runs CUDA kernels on the host to test them without a GPU: one fiber per CUDA thread, one block after another.
//
// Checks while a kernel runs (a violation throws emulation::Violation out of the launch):
//   barriers   every thread of the block must reach the same __syncthreads, and none may have returned
//   shuffles   every lane of the mask must reach the same call with the same mask, and read a lane of the mask
//   vectors    16-byte loads and stores must be 16-byte aligned
// Threads and blocks run in random order, and shared memory is filled with 0xFF before each block. Not checked: races
// between blocks, and memory ordering weaker than the host's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

namespace emulation {

struct Violation : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

// threadIdx, blockIdx, blockDim and gridDim of a kernel thread.
struct Position {
  Index3 thread, block, block_dim, grid_dim;
};

extern Position* current;  // of the running fiber

inline constexpr unsigned kWarp = 32;

// Runs body once per thread of the grid. May throw Violation.
void run_grid(Index3 grid, Index3 block, const std::function<void()>& body);

// Waits for all threads of the block. `line` identifies the barrier.
void barrier(int line);

// Waits for the lanes of `mask`, then returns the value that lane `source` passed.
uint64_t exchange(unsigned mask, uint64_t value, unsigned source, int line);

// Waits for the lanes of `mask` and orders memory between them.
void warp_barrier(unsigned mask, int line);

unsigned lane();

// Seeds the order of threads and blocks.
void seed(uint64_t value);

// Skips the blocks before `first` in grids of more than `first` blocks, for very large tensors. 0 runs all blocks.
void run_only(uint64_t first);
uint64_t first_block();

// Total bytes of shared memory that the kernels declare.
size_t shared_bytes();

// Launches, and the bytes of their parameters, since the last call.
struct Launches {
  int64_t count;
  int64_t parameter_bytes;
};
Launches take_launches();
void count_launch(int64_t parameter_bytes);

[[noreturn]] void fail(const std::string& what);  // throws Violation, naming thread and block

template <typename T>
T shuffle(unsigned mask, T value, unsigned source, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits, source, line);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename T>
void check_aligned(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0)
    fail("misaligned access of " + std::to_string(sizeof(T)) + " bytes");
}

}  // namespace emulation
