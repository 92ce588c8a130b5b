// Which tensors may go straight to the CPU kernels, without torch's dispatcher, and whether torch's modes allow it now.
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

// Returns the element type of a tensor that every kernel takes.
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

// Returns the element type of a tensor that can be measured.
inline std::optional<cpu::Dtype> measured_dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat8_e4m3fn:
      return cpu::Dtype::kFloat8E4M3;
    case at::kFloat8_e5m2:
      return cpu::Dtype::kFloat8E5M2;
    default:
      return dtype_of(tensor);
  }
}

// Whether a torch mode is active that must see every operator call.
inline bool is_watched() {
  return c10::impl::TorchDispatchModeTLS::any_modes_set() || at::impl::torch_function_mode_enabled();
}

// Whether a tensor is just strided memory of the CPU or, if `device` says so, of a CUDA device, with or without
// autograd: no subclass, no wrapper of a transform, no lazy conjugate or negation.
inline bool is_plain(const at::Tensor& tensor, at::Device device = at::kCPU) {
  using c10::DispatchKey;
  static const c10::DispatchKeySet kCpu{DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::ADInplaceOrView,
                                        DispatchKey::AutocastCPU};
  static const c10::DispatchKeySet kCuda{DispatchKey::CUDA, DispatchKey::AutogradCUDA, DispatchKey::ADInplaceOrView,
                                         DispatchKey::AutocastCUDA};
  const c10::DispatchKeySet plain = device.is_cpu() ? kCpu : kCuda;
  return tensor.defined() && tensor.layout() == at::kStrided && tensor.device() == device && tensor.has_storage() &&
         (tensor.key_set() - plain).highestFunctionalityKey() == DispatchKey::Undefined;
}

// Adds a tensor to a pass of the CPU kernels. Returns false if it is not plain or of an unsupported dtype.
inline bool add_to(cpu::Work& work, const at::Tensor& tensor) {
  if (!is_plain(tensor)) return false;
  const std::optional<cpu::Dtype> dtype = measured_dtype_of(tensor);
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
