// C entry points of the emulated kernels, for ctypes. Each returns 0, or 1 and leaves the reason in emulated_error().
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "emulation.h"

using gradprobe::Stats;
using gradprobe::cuda::Element;
using gradprobe::cuda::TensorSpan;

namespace {

std::string error_text;

int32_t flag = 0;
const int32_t* enabled = nullptr;

template <typename Call>
int guarded(Call&& call) {
  try {
    const cudaError_t error = call();
    if (error == cudaSuccess) return 0;
    error_text = std::string("launch: ") + cudaGetErrorString(error);
  } catch (const std::exception& error) {
    error_text = error.what();
  }
  return 1;
}

// Scratch space full of stale bytes, as from a caching allocator; zeros if only some blocks run.
std::vector<Stats> scratch(int64_t n) {
  std::vector<Stats> partials(static_cast<size_t>(n));
  if (n && emulation::first_block() == 0)
    std::memset(static_cast<void*>(partials.data()), 0xff, partials.size() * sizeof(Stats));
  return partials;
}

}  // namespace

extern "C" {

const char* emulated_error() { return error_text.c_str(); }
void* emulated_allocate(int64_t bytes) { return std::malloc(static_cast<size_t>(bytes)); }
void emulated_free(void* address) { std::free(address); }
void emulated_run_only(int64_t first_block) { emulation::run_only(static_cast<uint64_t>(first_block)); }
void emulated_seed(uint64_t value) { emulation::seed(value); }
uint64_t emulated_shared_bytes() { return emulation::shared_bytes(); }
void emulated_set_flag(int value) {
  flag = value;
  enabled = &flag;
}
void emulated_clear_flag() { enabled = nullptr; }
int64_t emulated_launches(int64_t* parameter_bytes) {
  const emulation::Launches launches = emulation::take_launches();
  *parameter_bytes = launches.parameter_bytes;
  return launches.count;
}

int emulated_grad_stats(const TensorSpan* tensors, int64_t n_tensors, int element, double* rows) {
  return guarded([&] {
    const auto type = static_cast<Element>(element);
    auto partials = scratch(gradprobe::cuda::count_partials(tensors, n_tensors, type));
    return gradprobe::cuda::grad_stats(tensors, n_tensors, type, partials.data(), rows, enabled, nullptr);
  });
}

int emulated_magnitudes(const TensorSpan* tensors, int64_t n_tensors, int element, double* rows) {
  return guarded([&] {
    const auto type = static_cast<Element>(element);
    const int64_t bytes = gradprobe::cuda::magnitude_bytes(tensors, n_tensors, type);
    auto partials = scratch((bytes + sizeof(Stats) - 1) / sizeof(Stats));
    return gradprobe::cuda::magnitudes(tensors, n_tensors, type, partials.data(), rows, nullptr);
  });
}

int emulated_scale(const TensorSpan* tensors, int64_t n_tensors, int element, const void* coefficient,
                   int coefficient_element) {
  return guarded([&] {
    return gradprobe::cuda::scale(tensors, n_tensors, static_cast<Element>(element), coefficient,
                                  static_cast<Element>(coefficient_element), nullptr);
  });
}

int emulated_clip_coefficient(const double* rows, int64_t n_rows, double max_norm, double* out) {
  return guarded([&] { return gradprobe::cuda::clip_coefficient(rows, n_rows, max_norm, out, nullptr); });
}

int emulated_residual_add(const void* x, const void* f, void* y, int64_t numel, int element, int relu, double* row) {
  return guarded([&] {
    const auto type = static_cast<Element>(element);
    auto partials = scratch(row ? gradprobe::cuda::count_partials(numel, type) : 0);
    return gradprobe::cuda::residual_add(x, f, y, numel, type, relu != 0, partials.data(), row, enabled, nullptr);
  });
}

int emulated_residual_add_backward(const void* grad_y, const void* y, void* grad_x, int64_t numel, int element,
                                   double* rows) {
  return guarded([&] {
    const auto type = static_cast<Element>(element);
    auto partials = scratch(rows ? 2 * gradprobe::cuda::count_partials(numel, type) : 0);
    return gradprobe::cuda::residual_add_backward(grad_y, y, grad_x, numel, type, partials.data(), rows, enabled,
                                                  nullptr);
  });
}

int emulated_branch_stats(const void* branch, const void* shortcut, int64_t numel, int element, double* rows) {
  return guarded([&] {
    const auto type = static_cast<Element>(element);
    auto partials = scratch(2 * gradprobe::cuda::count_partials(numel, type));
    return gradprobe::cuda::branch_stats(branch, shortcut, numel, type, partials.data(), rows, enabled, nullptr);
  });
}

}  // extern "C"
