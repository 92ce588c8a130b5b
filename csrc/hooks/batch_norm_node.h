// Batch normalisation fused with a residual add and a ReLU as nodes of C++ autograd, without torch's dispatcher.
// Anything but plain tensors and plain autograd goes to the operators.
//
// The graph is the one of separate modules, so that whoever walks it finds the batch normalisation and the residual
// add: with a shortcut, a ResidualAddBackward stands above the BatchNormBackward, although the normalised tensor
// between them never exists. A ReLU without a residual add is part of the BatchNormBackward.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/batch_norm_pass.h"
#include "hooks/channels_last.h"
#include "hooks/compiled_node.h"
#include "hooks/plain_tensor.h"
#include "hooks/residual_node.h"

namespace gradprobe {

inline cpu::Matrix matrix_of(const at::Tensor& x) { return {*dtype_of(x), x.numel() / x.size(1), x.size(1)}; }

// x, weight, bias -> batch_norm(x), or its positive part.
class BatchNormBackward final : public autograd::Node {
 public:
  std::string name() const override { return "BatchNormBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (autograd::SavedVariable* variable : {&x_, &weight_, &saved_, &y_}) variable->reset_data();
  }

  autograd::variable_list apply(autograd::variable_list&& gradients) override {
    const at::Tensor& incoming = gradients[0];
    if (!incoming.defined()) return {at::Tensor(), at::Tensor(), at::Tensor()};
    at::Tensor x, weight, saved, y;
    {
      const std::lock_guard<std::mutex> lock(mutex_);  // another thread may release them
      x = x_.unpack();
      weight = weight_.unpack();
      saved = saved_.unpack();
      if (relu) y = y_.unpack(getptr());
    }
    // a hook on saved tensors may return them in another dtype or memory order
    const auto fits = [&x](const at::Tensor& tensor) {
      return is_plain(tensor) && tensor.scalar_type() == x.scalar_type() && tensor.sizes() == x.sizes();
    };
    const bool has_kernel = x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16;
    const bool is_simple = !is_watched() && !at::GradMode::is_enabled() && has_kernel && fits(x) && is_matrix(x) &&
                           fits(incoming) && (!relu || (fits(y) && is_matrix(y))) && is_rows(weight) && is_rows(saved);
    if (!is_simple) return by_operator(incoming, x, weight, saved, y);
    const at::Tensor of_y = in_matrix_order(x, incoming);
    const at::Tensor grad_x = empty_beside(x);
    const at::Tensor grad_weight = at::detail::empty_cpu(weight.sizes(), at::kFloat);
    const at::Tensor grad_bias = at::detail::empty_cpu(weight.sizes(), at::kFloat);
    cpu::batch_norm_backward(matrix_of(x), of_y.const_data_ptr(), relu ? y.const_data_ptr() : nullptr,
                             x.const_data_ptr(), weight.const_data_ptr<float>(), saved.const_data_ptr<float>(),
                             grad_x.mutable_data_ptr(), nullptr, grad_weight.mutable_data_ptr<float>(),
                             grad_bias.mutable_data_ptr<float>());
    return {grad_x, grad_weight, grad_bias};
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& arguments) const override {
    arguments.collect(x_, false);
    arguments.collect(weight_, false);
    arguments.collect(saved_, false);
    arguments.collect(y_, true);
    arguments.collect(relu);
  }

  autograd::variable_list apply_with_saved(const autograd::variable_list& gradients,
                                           torch::dynamo::autograd::SwapSavedVariables& saved) override {
    autograd::SavedVariable* const variables[] = {&x_, &weight_, &saved_, &y_};
    for (autograd::SavedVariable* variable : variables) saved.before(*variable);
    std::vector<c10::IValue> arguments{x_.unpack(), weight_.unpack(), saved_.unpack()};
    if (relu) arguments.emplace_back(y_.unpack(getptr()));
    autograd::variable_list result = call_compiled(saved, *this, apply_functional, gradients, arguments);
    for (autograd::SavedVariable* variable : variables) saved.after(*variable);
    return result;
  }

  // Saves what the backward needs; y only if there is a ReLU.
  void save(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& saved, const at::Tensor& y) {
    x_ = autograd::SavedVariable(x, /*is_output=*/false);
    weight_ = autograd::SavedVariable(weight, /*is_output=*/false);
    saved_ = autograd::SavedVariable(saved, /*is_output=*/false);
    if (relu) y_ = autograd::SavedVariable(y, /*is_output=*/true);
  }

  bool relu = false;

 private:
  static bool is_rows(const at::Tensor& tensor) {
    return is_plain(tensor) && tensor.scalar_type() == at::kFloat && tensor.is_contiguous();
  }

  // Traced by compiled autograd. arguments: x, weight, saved, and y if there is a ReLU.
  static autograd::variable_list apply_functional(const autograd::variable_list& gradients,
                                                  const std::vector<c10::IValue>& arguments) {
    if (!gradients[0].defined()) return {at::Tensor(), at::Tensor(), at::Tensor()};
    return by_operator(gradients[0], arguments[0].toTensor(), arguments[1].toTensor(), arguments[2].toTensor(),
                       arguments.size() > 3 ? arguments[3].toTensor() : at::Tensor());
  }

  static autograd::variable_list by_operator(const at::Tensor& incoming, const at::Tensor& x, const at::Tensor& weight,
                                             const at::Tensor& saved, const at::Tensor& y) {
    using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
    static const auto operation = c10::Dispatcher::singleton()
                                      .findSchemaOrThrow("gradprobe::batch_norm_relu_backward", "")
                                      .typed<Results(const at::Tensor&, const std::optional<at::Tensor>&,
                                                     const at::Tensor&, const at::Tensor&, const at::Tensor&, bool)>();
    const auto [grad_x, unused, grad_weight, grad_bias] =
        operation.call(incoming, y.defined() ? std::optional(y) : std::nullopt, x, weight, saved, /*masked=*/false);
    return {grad_x, grad_weight, grad_bias};
  }

  autograd::SavedVariable x_, weight_, saved_, y_;
};

// The tensors of a batch normalisation; shortcut, running_mean and running_var may be undefined.
struct NormTensors {
  at::Tensor x, shortcut, weight, bias, running_mean, running_var;
};

// Whether batch_norm_relu() takes the tensors.
inline bool is_simple_norm(const NormTensors& of) {
  const at::Tensor& x = of.x;
  const auto is_usable = [](const at::Tensor& tensor) { return is_plain(tensor) && !tensor.is_inference(); };
  const auto is_per_channel = [&](const at::Tensor& values) {
    return is_usable(values) && values.scalar_type() == at::kFloat && values.dim() == 1 &&
           values.size(0) == x.size(1) && values.is_contiguous();
  };
  const auto is_running = [&](const at::Tensor& values) {
    return !values.defined() || (is_per_channel(values) && !values.requires_grad());
  };
  if (!is_usable(x) || (x.scalar_type() != at::kFloat && x.scalar_type() != at::kBFloat16)) return false;
  if (x.dim() < 2 || x.numel() <= x.size(1) || !is_matrix(x)) return false;
  if (of.shortcut.defined() &&
      (!is_usable(of.shortcut) || of.shortcut.scalar_type() != x.scalar_type() || of.shortcut.sizes() != x.sizes())) {
    return false;
  }
  return is_per_channel(of.weight) && is_per_channel(of.bias) && is_running(of.running_mean) &&
         is_running(of.running_var);
}

// Returns y = batch_norm(x) [+ shortcut], or max(y, 0), recorded for autograd. Requires is_simple_norm() and the GIL,
// which it releases during the pass.
inline at::Tensor batch_norm_relu(const NormTensors& of, double momentum, double eps, bool relu) {
  RECORD_FUNCTION("gradprobe::batch_norm_relu", std::vector<c10::IValue>({of.x, of.weight, of.bias, relu}));
  using NodePtr = std::remove_cvref_t<decltype(of.x.grad_fn())>;
  const at::Tensor& x = of.x;
  const bool adds = of.shortcut.defined();
  const at::Tensor y = empty_beside(x);
  const at::Tensor saved = at::detail::empty_cpu({2, x.size(1)}, at::kFloat);
  const at::Tensor added = adds ? in_matrix_order(x, of.shortcut) : at::Tensor();
  {
    const pybind11::gil_scoped_release no_gil;
    const auto running = [](const at::Tensor& values) {
      return values.defined() ? values.mutable_data_ptr<float>() : nullptr;
    };
    const cpu::Norm norm{of.weight.const_data_ptr<float>(),
                         of.bias.const_data_ptr<float>(),
                         running(of.running_mean),
                         running(of.running_var),
                         momentum,
                         eps};
    cpu::batch_norm(matrix_of(x), x.const_data_ptr(), adds ? added.const_data_ptr() : nullptr, y.mutable_data_ptr(),
                    norm, relu, saved.mutable_data_ptr<float>());
  }
  if (!at::GradMode::is_enabled()) return y;
  NodePtr node;
  if (x.requires_grad() || of.weight.requires_grad() || of.bias.requires_grad()) {
    auto* made = new BatchNormBackward();
    node = owner_of<NodePtr>(made);
    made->set_next_edges(autograd::collect_next_edges(x, of.weight, of.bias));
    made->relu = relu && !adds;
    if (!adds) autograd::set_history(y, node);
    made->save(x, of.weight, saved, y);
  }
  if (adds && (node || of.shortcut.requires_grad())) {
    auto* made = new ResidualAddBackward();
    const NodePtr sum = owner_of<NodePtr>(made);
    autograd::edge_list edges = autograd::collect_next_edges(of.shortcut);
    // The result of the batch normalisation is like y in all that autograd knows of it.
    edges.push_back(node ? autograd::Edge(node, node->add_input_metadata(y)) : autograd::Edge());
    made->set_next_edges(std::move(edges));
    made->relu = relu;
    autograd::set_history(y, sum);
    if (relu) made->save(y);
  }
  return y;
}

}  // namespace gradprobe
