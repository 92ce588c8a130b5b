// A residual add as a node of C++ autograd: one pass per direction, without torch's dispatcher, which takes longer than
// the kernels of a small residual add. Anything but plain tensors and plain autograd goes to the operators.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <c10/util/FunctionRef.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/residual_pass.h"
#include "hooks/compiled_node.h"
#include "hooks/plain_tensor.h"

namespace gradprobe {

namespace autograd = torch::autograd;

// Receives the gradients of a residual add in the backward pass.
class Observer {
 public:
  virtual ~Observer() = default;
  // Runs code that measures, and keeps its errors away from the training.
  virtual void fence(c10::function_ref<void()> measure) = 0;
  virtual bool wants_gradient() const = 0;
  // incoming: the gradient of y. gradient: the one that both operands get. Each with its raw row [6]. reaches_x: this
  // backward computes the gradient of x.
  virtual void on_gradient(const at::Tensor& incoming, const double* incoming_row, const at::Tensor& gradient,
                           const double* gradient_row, bool reaches_x) = 0;
};

// x, f -> x + f, or max(x + f, 0).
class ResidualAddBackward final : public autograd::Node {
 public:
  std::string name() const override { return "ResidualAddBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    y_.reset_data();
  }

  autograd::variable_list apply(autograd::variable_list&& gradients) override {
    const at::Tensor& incoming = gradients[0];
    if (!incoming.defined()) return {at::Tensor(), at::Tensor()};
    const bool is_observed = observer && observer->wants_gradient();
    Rows rows;
    bool has_rows = false;
    // Both operands get the same tensor: autograd copies a gradient that it does not own before adding to it.
    at::Tensor gradient = incoming;
    if (relu) {
      const at::Tensor y = saved_y();
      const bool is_fused = is_simple(incoming, y);
      if (is_observed && is_fused) {
        observer->fence([&] {
          gradient = masked(incoming, y, &rows);
          has_rows = true;
        });
      }
      if (!has_rows) gradient = is_fused ? masked(incoming, y, nullptr) : mask(incoming, y);
    }
    if (is_observed) {
      observer->fence([&] {
        if (!has_rows && !take_rows(incoming, gradient, rows)) return;
        // Detach only under create_graph: an unchanged object lets the next hook reuse its statistics.
        const at::Tensor kept = gradient.requires_grad() ? gradient.detach() : gradient;
        observer->on_gradient(incoming, rows[0], kept, rows[1], task_should_compute_output(0));
      });
    }
    return {gradient, gradient};
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& arguments) const override {
    arguments.collect(y_, true);
    arguments.collect(relu);
  }

  autograd::variable_list apply_with_saved(const autograd::variable_list& gradients,
                                           torch::dynamo::autograd::SwapSavedVariables& saved) override {
    saved.before(y_);
    std::vector<c10::IValue> arguments;
    if (relu) arguments.emplace_back(y_.unpack(getptr()));
    autograd::variable_list result = call_compiled(saved, *this, apply_functional, gradients, arguments);
    saved.after(y_);
    return result;
  }

  void save(const at::Tensor& y) { y_ = autograd::SavedVariable(y, /*is_output=*/true); }

  bool relu = false;
  std::shared_ptr<Observer> observer;

 private:
  at::Tensor saved_y() {
    const std::lock_guard<std::mutex> lock(mutex_);  // another thread may release it
    return y_.unpack(getptr());
  }

  // Traced by compiled autograd, unobserved. arguments: y if there is a ReLU, else empty.
  static autograd::variable_list apply_functional(const autograd::variable_list& gradients,
                                                  const std::vector<c10::IValue>& arguments) {
    const at::Tensor& incoming = gradients[0];
    if (!incoming.defined() || arguments.empty()) return {incoming, incoming};
    const at::Tensor gradient = mask(incoming, arguments[0].toTensor());
    return {gradient, gradient};
  }

  static at::Tensor mask(const at::Tensor& incoming, const at::Tensor& y) {
    static const auto operation = c10::Dispatcher::singleton()
                                      .findSchemaOrThrow("gradprobe::residual_add_backward", "")
                                      .typed<at::Tensor(const at::Tensor&, const at::Tensor&)>();
    return operation.call(incoming, y);
  }

  using Rows = double[2][kStats];  // incoming, outgoing gradient

  // Whether the fused pass may replace the operator.
  static bool is_simple(const at::Tensor& incoming, const at::Tensor& y) {
    return !is_watched() && !at::GradMode::is_enabled() && is_plain(incoming) && is_plain(y) &&
           incoming.scalar_type() == y.scalar_type() && incoming.sizes() == y.sizes() &&
           incoming.strides() == y.strides();
  }

  // Returns the gradient masked by the ReLU of y, and writes both rows unless `rows` is null. Requires is_simple().
  static at::Tensor masked(const at::Tensor& incoming, const at::Tensor& y, Rows* rows) {
    at::Tensor gradient = at::detail::empty_strided_cpu(y.sizes(), y.strides(), y.scalar_type());
    const int64_t numel = y.numel();
    cpu::Partials partials(rows == nullptr ? 0 : numel, 2);
    cpu::mask(*dtype_of(y), incoming.const_data_ptr(), y.const_data_ptr(), gradient.mutable_data_ptr(), numel,
              rows == nullptr ? nullptr : &partials);
    if (rows != nullptr) {
      partials.finish_row(0, (*rows)[0]);
      partials.finish_row(1, (*rows)[1]);
    }
    return gradient;
  }

  static bool take_rows(const at::Tensor& incoming, const at::Tensor& gradient, Rows& rows) {
    if (!take_row(incoming, rows[0])) return false;
    if (!gradient.is_same(incoming)) return take_row(gradient, rows[1]);
    std::copy_n(rows[0], kStats, rows[1]);
    return true;
  }

  static bool take_row(const at::Tensor& tensor, double* row) {
    const at::Tensor values = tensor.is_neg() ? tensor.resolve_neg() : tensor;
    cpu::Work work(1);
    if (!add_to(work, values)) return false;
    cpu::grad_stats(work, row);
    return true;
  }

  autograd::SavedVariable y_;
};

// Whether two operands have the same memory order and torch's add would give the sum that order too. See empty_sum in
// residual_layout.h.
inline bool is_simple_pair(const at::Tensor& x, const at::Tensor& f) {
  if (!is_plain(x) || !is_plain(f) || x.scalar_type() != f.scalar_type() || x.sizes() != f.sizes() || x.numel() == 0 ||
      x.is_inference() || f.is_inference() || !dtype_of(x)) {
    return false;
  }
  if (x.is_contiguous() && f.is_contiguous()) return true;
  if (x.strides() != f.strides()) return false;
  const auto sizes = x.sizes();
  const bool is_ambiguous = (x.dim() == 4 || x.dim() == 5) && std::find(sizes.begin(), sizes.end(), 1) != sizes.end();
  return !is_ambiguous && cpu::reduce_dims(sizes.data(), x.strides().data(), x.dim()).dense();
}

// From torch 2.13 on, a node holds its own reference count; before, a shared_ptr did.
template <typename NodePtr, typename Made>
NodePtr owner_of(Made* node) {
  if constexpr (std::is_same_v<NodePtr, std::shared_ptr<autograd::Node>>) {
    return NodePtr(node);
  } else {
    return NodePtr::unsafe_steal_from_new(node);
  }
}

// Returns y = x + f, or max(x + f, 0), recorded for autograd, and writes the raw row of y unless `row` is null; a row
// needs an observer. Requires is_simple_pair() and the GIL, which it releases during the pass.
inline at::Tensor residual_add(const at::Tensor& x, const at::Tensor& f, bool relu, double* row,
                               const std::shared_ptr<Observer>& observer) {
  RECORD_FUNCTION("gradprobe::residual_add", std::vector<c10::IValue>({x, f, relu}));
  using NodePtr = std::remove_cvref_t<decltype(x.grad_fn())>;
  NodePtr node;
  if (at::GradMode::is_enabled() && (x.requires_grad() || f.requires_grad())) {
    auto* made = new ResidualAddBackward();
    node = owner_of<NodePtr>(made);
    made->set_next_edges(autograd::collect_next_edges(x, f));
    made->relu = relu;
    made->observer = observer;
  }
  at::Tensor y = x.is_contiguous() ? at::detail::empty_cpu(x.sizes(), x.scalar_type())
                                   : at::detail::empty_strided_cpu(x.sizes(), x.strides(), x.scalar_type());
  {
    const pybind11::gil_scoped_release no_gil;
    const auto join = [&](cpu::Partials* partials) {
      cpu::join(*dtype_of(x), x.const_data_ptr(), f.const_data_ptr(), y.mutable_data_ptr(), x.numel(), relu, partials);
    };
    bool is_done = false;
    if (row != nullptr) {
      observer->fence([&] {
        cpu::Partials partials(x.numel(), 1);
        join(&partials);
        partials.finish_row(0, row);
        is_done = true;
      });
    }
    if (!is_done) join(nullptr);
  }
  if (node) {
    autograd::set_history(y, node);
    if (relu) static_cast<ResidualAddBackward*>(node.get())->save(y);
  }
  return y;
}

}  // namespace gradprobe
