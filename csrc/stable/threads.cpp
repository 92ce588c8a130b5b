// torch's thread pool for the CPU kernels, which do not include torch's headers.
#include "cpu/threads.h"

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace gradprobe::cpu {

int64_t count_threads() { return torch::stable::get_num_threads(); }

void run_in_parallel(int64_t n, void (*task)(int64_t begin, int64_t end, void* context), void* context) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { task(begin, end, context); });
}

}  // namespace gradprobe::cpu
