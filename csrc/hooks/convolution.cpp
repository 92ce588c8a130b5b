// Winograd's convolution as a node of C++ autograd. Handles plain tensors in plain autograd; torch convolves the
// others.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wstringop-overflow"  // false positive of GCC 12 in torch's reference counts
#endif

#include "hooks/convolution.h"

#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/sum.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/winograd_pass.h"
#include "hooks/channels_last.h"
#include "hooks/compiled_node.h"
#include "hooks/forward_passes.h"
#include "hooks/plain_tensor.h"
#include "hooks/residual_node.h"

namespace gradprobe {
namespace {

cpu::Images images_of(const at::Tensor& x) { return {x.size(0), x.size(2), x.size(3)}; }

// Whether a tensor is dense float32 [N, C, H, W] with the channels innermost.
bool is_channels_last(const at::Tensor& tensor) {
  return is_plain(tensor) && tensor.scalar_type() == at::kFloat && tensor.dim() == 4 && tensor.numel() > 0 &&
         is_matrix(tensor);
}

// Whether the kernel takes the tensors.
bool is_simple(const at::Tensor& x, const at::Tensor& weight) {
  return is_channels_last(x) && is_channels_last(weight) && weight.size(1) == x.size(1) && weight.size(2) == 3 &&
         weight.size(3) == 3 && cpu::is_suitable(images_of(x), weight.size(1), weight.size(0));
}

at::Tensor empty_images(const at::Tensor& like, int64_t n_channels) {
  const int64_t height = like.size(2), width = like.size(3);
  return at::detail::empty_strided_cpu({like.size(0), n_channels, height, width},
                                       {height * width * n_channels, 1, width * n_channels, n_channels}, at::kFloat);
}

// x, weight, bias -> convolution(x, weight) + bias; the bias may be undefined.
class ConvolutionBackward final : public autograd::Node {
 public:
  std::string name() const override { return "ConvolutionBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    x_.reset_data();
    weight_.reset_data();
  }

  autograd::variable_list apply(autograd::variable_list&& gradients) override {
    const at::Tensor& incoming = gradients[0];
    if (!incoming.defined()) return {at::Tensor(), at::Tensor(), at::Tensor()};
    at::Tensor x, weight;
    {
      const std::lock_guard<std::mutex> lock(mutex_);  // another thread may release them
      x = x_.unpack();
      weight = weight_.unpack();
    }
    const std::array<bool, 3> needed{task_should_compute_output(0), task_should_compute_output(1),
                                     task_should_compute_output(2)};
    // a hook on saved tensors may return them in another dtype or memory order
    const bool takes = !is_watched() && !at::GradMode::is_enabled() && is_simple(x, weight) && is_plain(incoming) &&
                       incoming.scalar_type() == at::kFloat;
    if (!takes) return by_torch(incoming, x, weight, needed);
    at::Tensor of_y = incoming;
    if (!is_matrix(incoming)) {
      const at::AutoDispatchBelowADInplaceOrView below;
      of_y = empty_images(x, weight.size(0)).copy_(incoming);
    }
    at::Tensor grad_x, grad_weight, grad_bias;
    if (needed[0]) {
      grad_x = empty_beside(x);
      cpu::convolve_backward_input(images_of(x), of_y.const_data_ptr<float>(), weight.const_data_ptr<float>(),
                                   weight.size(1), weight.size(0), grad_x.mutable_data_ptr<float>());
    }
    if (needed[1]) {
      grad_weight = empty_beside(weight);
      cpu::convolve_backward_filters(images_of(x), of_y.const_data_ptr<float>(), x.const_data_ptr<float>(),
                                     weight.size(1), weight.size(0), grad_weight.mutable_data_ptr<float>());
    }
    if (needed[2]) {
      const at::AutoDispatchBelowADInplaceOrView below;
      grad_bias = at::sum(of_y, {0, 2, 3});
    }
    return {grad_x, grad_weight, grad_bias};
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& arguments) const override {
    arguments.collect(x_, false);
    arguments.collect(weight_, false);
    arguments.collect(has_bias);
  }

  autograd::variable_list apply_with_saved(const autograd::variable_list& gradients,
                                           torch::dynamo::autograd::SwapSavedVariables& saved) override {
    saved.before(x_);
    saved.before(weight_);
    autograd::variable_list result =
        call_compiled(saved, *this, has_bias ? apply_functional<true> : apply_functional<false>, gradients,
                      {x_.unpack(), weight_.unpack()});
    saved.after(x_);
    saved.after(weight_);
    return result;
  }

  void save(const at::Tensor& x, const at::Tensor& weight) {
    x_ = autograd::SavedVariable(x, /*is_output=*/false);
    weight_ = autograd::SavedVariable(weight, /*is_output=*/false);
  }

  bool has_bias = false;

 private:
  // Traced by compiled autograd. arguments: x, weight.
  template <bool kHasBias>
  static autograd::variable_list apply_functional(const autograd::variable_list& gradients,
                                                  const std::vector<c10::IValue>& arguments) {
    if (!gradients[0].defined()) return {at::Tensor(), at::Tensor(), at::Tensor()};
    return by_torch(gradients[0], arguments[0].toTensor(), arguments[1].toTensor(), {true, true, kHasBias});
  }

  static autograd::variable_list by_torch(const at::Tensor& incoming, const at::Tensor& x, const at::Tensor& weight,
                                          const std::array<bool, 3>& needed) {
    const std::array<int64_t, 2> one{1, 1}, none{0, 0};
    const std::array<int64_t, 1> bias_sizes{weight.size(0)};
    const auto [grad_x, grad_weight, grad_bias] =
        at::convolution_backward(incoming, x, weight, at::OptionalIntArrayRef(bias_sizes), one, one, one,
                                 /*transposed=*/false, none, /*groups=*/1, needed);
    return {grad_x, grad_weight, grad_bias};
  }

  autograd::SavedVariable x_, weight_;
};

// Returns convolution(x, weight) + bias, which may be None; None if the kernel does not take the tensors or torch has
// to see the call.
std::optional<at::Tensor> convolve(py::handle x_object, py::handle weight_object, py::handle bias_object) {
  const at::Tensor *x = exact_tensor(x_object), *weight = exact_tensor(weight_object);
  if (x == nullptr || weight == nullptr || !is_simple(*x, *weight)) return std::nullopt;
  if (x->is_inference() || weight->is_inference()) return std::nullopt;
  at::Tensor bias;
  if (!bias_object.is_none()) {
    const at::Tensor* given = exact_tensor(bias_object);
    if (given == nullptr || !is_plain(*given) || given->scalar_type() != at::kFloat || given->dim() != 1 ||
        given->size(0) != weight->size(0) || !given->is_contiguous() || given->is_inference()) {
      return std::nullopt;
    }
    bias = *given;
  }
  if (!is_plain_execution() || at::autocast::is_autocast_enabled(at::kCPU)) return std::nullopt;
  return keeping_python_errors([&] {
    RECORD_FUNCTION("gradprobe::convolve", std::vector<c10::IValue>({*x, *weight}));
    using NodePtr = std::remove_cvref_t<decltype(x->grad_fn())>;
    const at::Tensor y = empty_images(*x, weight->size(0));
    {
      const pybind11::gil_scoped_release no_gil;
      cpu::convolve(images_of(*x), x->const_data_ptr<float>(), weight->const_data_ptr<float>(),
                    bias.defined() ? bias.const_data_ptr<float>() : nullptr, weight->size(1), weight->size(0),
                    y.mutable_data_ptr<float>());
    }
    const bool is_recorded = x->requires_grad() || weight->requires_grad() || (bias.defined() && bias.requires_grad());
    if (at::GradMode::is_enabled() && is_recorded) {
      auto* made = new ConvolutionBackward();
      const NodePtr node = owner_of<NodePtr>(made);
      made->set_next_edges(autograd::collect_next_edges(*x, *weight, bias));
      made->has_bias = bias.defined();
      made->save(*x, *weight);
      autograd::set_history(y, node);
    }
    return y;
  });
}

}  // namespace

void define_convolution(py::module_& module) {
  module.def("convolve", &convolve, py::arg("x"), py::arg("weight"), py::arg("bias"));
}

}  // namespace gradprobe
