// The CPU implementations of the batch normalisation operators: checks arguments, chooses between the fused kernel and
// torch's own operators, and registers with torch through its stable ABI.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <tuple>

#include "core/layout.h"
#include "cpu/batch_norm_pass.h"
#include "cpu/kernels.h"
#include "stable/arguments.h"
#include "stable/residual_layout.h"

namespace gradprobe {
namespace {

using cpu::Dtype;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;

// Calls an operator and returns its results.
template <size_t n_results, typename... Arguments>
std::array<StableIValue, n_results> call_operator(const char* name, const Arguments&... arguments) {
  std::array<StableIValue, std::max(n_results, sizeof...(Arguments))> stack{from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  std::array<StableIValue, n_results> results;
  std::copy_n(stack.begin(), n_results, results.begin());
  return results;
}

void check_channels(const Tensor& values, const Tensor& x, const char* name) {
  const ScalarType needed = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check_cpu(values, name);
  STD_TORCH_CHECK(values.scalar_type() == needed, name, ": needed dtype ", torch::headeronly::toString(needed),
                  ", got ", torch::headeronly::toString(values.scalar_type()));
  STD_TORCH_CHECK(values.dim() == 1 && values.size(0) == x.size(1), name, ": needed shape [", x.size(1), "], got ",
                  shape_of(values));
}

Dtype check_input(const Tensor& x) {
  const Dtype dtype = dtype_of(x.get(), "x");
  check_cpu(x, "x");
  STD_TORCH_CHECK(x.dim() >= 2, "x: needed at least two dimensions, got shape ", shape_of(x));
  return dtype;
}

bool is_matrix(const Tensor& x) { return cpu::has_channels_last(x.sizes().data(), x.strides().data(), x.dim()); }

// Whether the fused kernel takes x.
bool is_fused(const Tensor& x, Dtype dtype) {
  return (dtype == Dtype::kFloat32 || dtype == Dtype::kBFloat16) && is_matrix(x);
}

// Returns `values` in the memory order of x, which is a matrix: a copy unless they have that order.
std::optional<Tensor> in_matrix_order(const Tensor& x, const std::optional<Tensor>& values) {
  return !values || is_matrix(*values) ? values : in_order_of(x, *values);
}

cpu::Matrix matrix_of(const Tensor& x, Dtype dtype) { return {dtype, x.numel() / x.size(1), x.size(1)}; }

// batch_norm_relu(Tensor x, Tensor? shortcut, Tensor weight, Tensor bias, Tensor(a!)? running_mean,
//                 Tensor(b!)? running_var, float momentum, float eps, bool relu) -> (Tensor y, Tensor saved)
std::tuple<Tensor, Tensor> batch_norm_relu(Tensor x, std::optional<Tensor> shortcut, Tensor weight, Tensor bias,
                                           std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
                                           double momentum, double eps, bool relu) {
  const Dtype dtype = check_input(x);
  check_channels(weight, x, "weight");
  check_channels(bias, x, "bias");
  if (running_mean) check_channels(*running_mean, x, "running_mean");
  if (running_var) check_channels(*running_var, x, "running_var");
  if (shortcut) {
    check_cpu(*shortcut, "shortcut");
    check_alike(x, *shortcut, "x", "shortcut");
  }
  Tensor y = torch::stable::empty_like(x);
  Tensor saved = torch::stable::new_empty(weight, {2, x.size(1)});
  if (x.numel() == 0) {
    torch::stable::zero_(saved);
    return {y, saved};
  }
  if (!is_fused(x, dtype)) {
    const auto results = call_operator<3>("aten::native_batch_norm", x, std::optional(weight), std::optional(bias),
                                          running_mean, running_var, true, momentum, eps);
    Tensor result = to<Tensor>(results[0]);
    const Tensor mean = to<Tensor>(results[1]), invstd = to<Tensor>(results[2]);
    if (shortcut) {
      result = sum_by_torch(*shortcut, result, relu);
    } else if (relu) {
      result = to<Tensor>(call_operator<1>("aten::relu", result)[0]);
    }
    torch::stable::copy_(y, result);
    Tensor of_means = torch::stable::narrow(saved, 0, 0, 1), of_invstds = torch::stable::narrow(saved, 0, 1, 1);
    torch::stable::copy_(of_means, mean);
    torch::stable::copy_(of_invstds, invstd);
    return {y, saved};
  }
  const auto dense = [](const Tensor& values) { return torch::stable::contiguous(values); };
  const Tensor weights = dense(weight), biases = dense(bias);
  const auto written = [&](const std::optional<Tensor>& values) -> float* {
    if (!values) return nullptr;
    STD_TORCH_CHECK(values->is_contiguous(), "running_mean, running_var: needed contiguous tensors");
    return static_cast<float*>(values->mutable_data_ptr());
  };
  const cpu::Norm norm{static_cast<const float*>(weights.const_data_ptr()),
                       static_cast<const float*>(biases.const_data_ptr()),
                       written(running_mean),
                       written(running_var),
                       momentum,
                       eps};
  const std::optional<Tensor> added = in_matrix_order(x, shortcut);
  cpu::batch_norm(matrix_of(x, dtype), x.const_data_ptr(), added ? added->const_data_ptr() : nullptr,
                  y.mutable_data_ptr(), norm, relu, static_cast<float*>(saved.mutable_data_ptr()));
  return {y, saved};
}

// batch_norm_relu_backward(Tensor grad_y, Tensor? y, Tensor x, Tensor weight, Tensor saved, bool masked)
//     -> (Tensor grad_x, Tensor grad_shortcut, Tensor grad_weight, Tensor grad_bias)
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_relu_backward(Tensor grad_y, std::optional<Tensor> y, Tensor x,
                                                                    Tensor weight, Tensor saved, bool masked) {
  const Dtype dtype = check_input(x);
  check_channels(weight, x, "weight");
  check_cpu(grad_y, "grad_y");
  check_alike(x, grad_y, "x", "grad_y");
  if (y) check_alike(x, *y, "x", "y");
  STD_TORCH_CHECK(y || !masked, "masked: needed y, the result of a ReLU, got none");
  STD_TORCH_CHECK(saved.scalar_type() == weight.scalar_type() && saved.dim() == 2 && saved.size(0) == 2 &&
                      saved.size(1) == x.size(1),
                  "saved: needed [2, ", x.size(1), "] of the dtype of weight, got ", shape_of(saved));
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_shortcut = masked ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor grad_weight = torch::stable::new_empty(weight, {x.size(1)}),
         grad_bias = torch::stable::empty_like(grad_weight);
  if (x.numel() == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
    return {grad_x, grad_shortcut, grad_weight, grad_bias};
  }
  if (!is_fused(x, dtype)) {
    Tensor g = grad_y;
    if (y) g = to<Tensor>(call_operator<1>("gradprobe::residual_add_backward", grad_y, *y)[0]);
    const auto row = [&](int64_t k) { return std::optional(torch::stable::select(saved, 0, k)); };
    const std::optional<Tensor> none;
    constexpr std::array<bool, 3> kAll{true, true, true};
    const auto results = call_operator<3>("aten::native_batch_norm_backward", g, x, std::optional(weight), none, none,
                                          row(0), row(1), true, 0.0, torch::headeronly::HeaderOnlyArrayRef<bool>(kAll));
    torch::stable::copy_(grad_x, to<Tensor>(results[0]));
    torch::stable::copy_(grad_weight, to<Tensor>(results[1]));
    torch::stable::copy_(grad_bias, to<Tensor>(results[2]));
    if (masked) torch::stable::copy_(grad_shortcut, g);
    return {grad_x, grad_shortcut, grad_weight, grad_bias};
  }
  const Tensor incoming = *in_matrix_order(x, grad_y);
  const std::optional<Tensor> masking = in_matrix_order(x, y);
  const Tensor weights = torch::stable::contiguous(weight), moments = torch::stable::contiguous(saved);
  cpu::batch_norm_backward(
      matrix_of(x, dtype), incoming.const_data_ptr(), masking ? masking->const_data_ptr() : nullptr, x.const_data_ptr(),
      static_cast<const float*>(weights.const_data_ptr()), static_cast<const float*>(moments.const_data_ptr()),
      grad_x.mutable_data_ptr(), masked ? grad_shortcut.mutable_data_ptr() : nullptr,
      static_cast<float*>(grad_weight.mutable_data_ptr()), static_cast<float*>(grad_bias.mutable_data_ptr()));
  return {grad_x, grad_shortcut, grad_weight, grad_bias};
}

}  // namespace
}  // namespace gradprobe

STABLE_TORCH_LIBRARY_IMPL(gradprobe, CPU, m) {
  m.impl("batch_norm_relu", TORCH_BOX(&gradprobe::batch_norm_relu));
  m.impl("batch_norm_relu_backward", TORCH_BOX(&gradprobe::batch_norm_relu_backward));
}
