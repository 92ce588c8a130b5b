// Launches translated kernels on the scheduler of the emulation.
#include "machine.h"

#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#include "emulation.h"

namespace ptx {

Traffic traffic;

namespace {

std::map<std::string, void (*)(void**)>& kernels() {
  static std::map<std::string, void (*)(void**)> by_name;  // before the static objects that fill it
  return by_name;
}

}  // namespace

Kernel::Kernel(const char* name, void (*program)(void**)) { kernels().emplace(name, program); }

}  // namespace ptx

extern "C" {

// Called by cudaLaunchKernel of fake_runtime.cpp.
void fake_launch(const char* name, unsigned n_blocks, unsigned n_threads, void** arguments) {
  const auto kernel = ptx::kernels().find(name);
  if (kernel == ptx::kernels().end()) throw std::runtime_error(std::string("no PTX of kernel ") + name);
  emulation::count_launch(0);  // the runtime does not tell the size of the parameters
  emulation::run_grid({n_blocks, 1, 1}, {n_threads, 1, 1}, [&] { kernel->second(arguments); });
}

// Returns the bytes that were moved since the last call.
void ptx_take_traffic(ptx::Traffic* out) { *out = std::exchange(ptx::traffic, {}); }
}
