// Which tensors the CPU kernels may take straight from C++, past torch's dispatcher; and whether the moment allows it.
// Built against one exact torch.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <cstdint>
#include <optional>

#include "core/layout.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace gradprobe {

inline std::optional<cpu::Dtype> dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return cpu::Dtype::kFloat32;
    case at::kHalf:
      return cpu::Dtype::kFloat16;
    case at::kBFloat16:
      return cpu::Dtype::kBFloat16;
    case at::kDouble:
      return cpu::Dtype::kFloat64;
    default:
      return std::nullopt;
  }
}

// Whether a mode of torch wants to see every call of an operator.
inline bool is_watched() {
  return c10::impl::TorchDispatchModeTLS::any_modes_set() || at::impl::torch_function_mode_enabled();
}

// Whether a tensor is nothing but strided memory on the CPU and a place in autograd's graph: no subclass, no wrapper of
// a transform, no values that are not in its memory.
inline bool is_plain(const at::Tensor& tensor) {
  using c10::DispatchKey;
  static const c10::DispatchKeySet kPlain{DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::ADInplaceOrView,
                                          DispatchKey::AutocastCPU};
  return tensor.defined() && tensor.layout() == at::kStrided && tensor.device().is_cpu() && tensor.has_storage() &&
         (tensor.key_set() - kPlain).highestFunctionalityKey() == DispatchKey::Undefined;
}

// Adds a tensor to a pass of the CPU kernels; false where they do not take it: it is not plain, or of another dtype.
inline bool add_to(cpu::Work& work, const at::Tensor& tensor) {
  if (!is_plain(tensor)) return false;
  const std::optional<cpu::Dtype> dtype = dtype_of(tensor);
  if (!dtype) return false;
  const int64_t numel = tensor.numel();
  if (numel == 0 || tensor.is_contiguous()) {
    work.add(numel == 0 ? nullptr : tensor.const_data_ptr(), *dtype, numel);
  } else {
    const cpu::Dims dims = cpu::reduce_dims(tensor.sizes().data(), tensor.strides().data(), tensor.dim());
    work.add(tensor.const_data_ptr(), *dtype, numel, &dims);
  }
  return true;
}

}  // namespace gradprobe
