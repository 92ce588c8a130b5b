// What translated kernels are registered in, and what they count.
#pragma once

#include <cstdint>

namespace ptx {

// Bytes of global memory that the instructions of all threads move.
struct Traffic {
  int64_t loaded = 0;
  int64_t stored = 0;
};
extern Traffic traffic;

// Makes one thread's program known by the kernel's mangled name.
struct Kernel {
  Kernel(const char* name, void (*program)(void** arguments));
};

}  // namespace ptx
