// The thread pool that the kernels run on. They know no torch: stable/threads.cpp, which both libraries link, defines
// these functions with torch's pool.
#pragma once

#include <cstdint>

namespace gradprobe::cpu {

int64_t count_threads();

// Calls task(begin, end, context) for ranges that together cover [0, n).
void run_in_parallel(int64_t n, void (*task)(int64_t begin, int64_t end, void* context), void* context);

// The same for a callable.
template <typename Task>
void parallel_for(int64_t n, const Task& task) {
  const auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const Task*>(context))(begin, end); };
  run_in_parallel(n, call, const_cast<void*>(static_cast<const void*>(&task)));
}

}  // namespace gradprobe::cpu
