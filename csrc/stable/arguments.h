// Reads and checks the operators' arguments on any device.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <string>
#include <vector>

#include "core/layout.h"
#include "core/stats.h"
#include "cpu/kernels.h"

namespace gradprobe {

// Owns the handles of a Tensor[] argument.
class TensorList {
 public:
  explicit TensorList(StableIValue argument) : list_(torch::stable::detail::to<StableListHandle>(argument)) {
    size_t size = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_list_size(list_, &size));
    handles_.reserve(size);
    for (size_t k = 0; k < size; ++k) {
      StableIValue element;
      STABLE_TORCH_ERROR_CODE_CHECK(torch_list_get_item(list_, k, &element));
      handles_.push_back(torch::stable::detail::to<AtenTensorHandle>(element));
    }
  }
  ~TensorList() {
    for (AtenTensorHandle handle : handles_) aoti_torch_delete_tensor_object(handle);
    torch_delete_list(list_);
  }
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;

  int64_t size() const { return static_cast<int64_t>(handles_.size()); }
  AtenTensorHandle operator[](int64_t k) const { return handles_[k]; }

 private:
  StableListHandle list_;
  std::vector<AtenTensorHandle> handles_;
};

// Returns the element type of argument `name`, or of its element `index` if it is a list. measures: float8 is accepted.
inline cpu::Dtype dtype_of(AtenTensorHandle tensor, const char* name, int64_t index = -1, bool measures = false) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &dtype));
  if (dtype == aoti_torch_dtype_float32()) return cpu::Dtype::kFloat32;
  if (dtype == aoti_torch_dtype_float16()) return cpu::Dtype::kFloat16;
  if (dtype == aoti_torch_dtype_bfloat16()) return cpu::Dtype::kBFloat16;
  if (dtype == aoti_torch_dtype_float64()) return cpu::Dtype::kFloat64;
  if (measures && dtype == aoti_torch_dtype_float8_e4m3fn()) return cpu::Dtype::kFloat8E4M3;
  if (measures && dtype == aoti_torch_dtype_float8_e5m2()) return cpu::Dtype::kFloat8E5M2;
  STD_TORCH_CHECK(false, name, index < 0 ? "" : "[" + std::to_string(index) + "]",
                  ": needed a dtype of float16, bfloat16, float32, float64",
                  measures ? ", float8_e4m3fn, float8_e5m2, got " : ", got ",
                  torch::headeronly::toString(static_cast<torch::headeronly::ScalarType>(dtype)));
}

// Returns the dimensions of a tensor in memory order.
inline cpu::Dims dims_of(AtenTensorHandle tensor) {
  int64_t n_dims = 0;
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &n_dims));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &sizes));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &strides));
  return cpu::reduce_dims(sizes, strides, n_dims);
}

inline void check_cpu(const torch::stable::Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": needed device cpu, got device type number ",
                  static_cast<int>(tensor.device().type()));
}

// Checks that `rows` are the rows of n_tensors tensors; does not check their device.
inline void check_rows(const torch::stable::Tensor& rows, int64_t n_tensors, const char* name = "out",
                       int64_t width = kStats) {
  STD_TORCH_CHECK(rows.scalar_type() == torch::headeronly::ScalarType::Double, name, ": needed dtype float64, got ",
                  torch::headeronly::toString(rows.scalar_type()));
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(0) == n_tensors && rows.size(1) == width, name, ": needed shape [",
                  n_tensors, ", ", width, "], got ",
                  rows.dim() == 2 ? "[" + std::to_string(rows.size(0)) + ", " + std::to_string(rows.size(1)) + "]"
                                  : std::to_string(rows.dim()) + " dimensions");
  STD_TORCH_CHECK(rows.is_contiguous(), name, ": needed contiguous rows, got strides [", rows.stride(0), ", ",
                  rows.stride(1), "]");
}

// Tells autograd that a tensor is being written. The stable ABI has no call for that, but an in-place operation on an
// empty view increments the version that all views of the memory share, and launches nothing.
inline void count_write(const torch::stable::Tensor& written) {
  AtenTensorHandle none = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_narrow(written.get(), 0, 0, 0, &none));
  const torch::stable::Tensor view(none);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(view.get()));
}

}  // namespace gradprobe
