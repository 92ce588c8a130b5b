// The rows of tensors that have been measured in this step.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>

#include <cstdint>
#include <unordered_map>
#include <utility>

namespace gradprobe {

// Row: what a row is remembered by. Needs a lock around each call.
template <typename Row>
class KnownRows {
 public:
  // Returns the row of a tensor; null if there is none or the tensor has changed since.
  const Row* find(const at::Tensor& tensor) const {
    if (tensor.is_inference()) return nullptr;  // inference tensors have no version
    const auto found = known_.find(tensor.unsafeGetTensorImpl());
    if (found == known_.end() || found->second.version != tensor._version()) return nullptr;
    return &found->second.row;
  }

  void remember(const at::Tensor& tensor, Row row) {
    if (tensor.is_inference() || tensor.layout() != at::kStrided) return;
    // The weak reference keeps the address from being reused for another tensor.
    known_.insert_or_assign(
        tensor.unsafeGetTensorImpl(),
        Known{Weak(tensor.getIntrusivePtr()), static_cast<uint32_t>(tensor._version()), std::move(row)});
  }

  void clear() { known_.clear(); }

 private:
  using Weak = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;

  struct Known {
    Weak tensor;
    uint32_t version;
    Row row;
  };

  std::unordered_map<const c10::TensorImpl*, Known> known_;
};

}  // namespace gradprobe
