// The CUDA implementations of gradprobe's operators: checks arguments, groups tensors by dtype, chooses device and
// stream, allocates scratch space, and registers with torch through its stable ABI.
//
// Scratch space comes from torch's caching allocator: no CUDA call after the first step, and the stream orders its
// reuse. Under capture it comes from the CUDA graph's own pool, so replays share it with nobody.
#ifndef GRADPROBE_TORCH_DEVICE
#define GRADPROBE_TORCH_DEVICE "stable/torch_device.h"
#endif

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "core/layout.h"
#include "core/magnitudes.h"
#include "cuda/launch.h"
#include "stable/arguments.h"
#include "stable/residual_layout.h"
#include GRADPROBE_TORCH_DEVICE

namespace gradprobe {
namespace {

using cuda::Element;
using cuda::kBytes;
using cuda::kElements;
using cuda::TensorSpan;
using torch::stable::Tensor;

Element element_of(AtenTensorHandle tensor, const char* name, int64_t index = -1, bool measures = false) {
  switch (dtype_of(tensor, name, index, measures)) {
    case cpu::Dtype::kFloat16:
      return Element::f16;
    case cpu::Dtype::kBFloat16:
      return Element::bf16;
    case cpu::Dtype::kFloat32:
      return Element::f32;
    case cpu::Dtype::kFloat8E4M3:
      return Element::e4m3;
    case cpu::Dtype::kFloat8E5M2:
      return Element::e5m2;
    case cpu::Dtype::kFloat64:
      break;
  }
  return Element::f64;
}

int32_t device_index_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.device().type() == cuda::kDeviceType, name, ": needed a ", cuda::kDeviceName,
                  " device, got device type number ", static_cast<int>(tensor.device().type()));
  return tensor.device().index();
}

void check_launch(cudaError_t error, const char* name, int32_t device_index) {
  STD_TORCH_CHECK(error == cudaSuccess, name, ": launch failed on ", cuda::kDeviceName, ":", device_index, ": ",
                  cudaGetErrorString(error));
}

enum class Order { dense, strided, overlapping };

Order order_of(AtenTensorHandle tensor) {
  bool is_contiguous = false;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(tensor, &is_contiguous));
  if (is_contiguous) return Order::dense;
  const cpu::Dims dims = dims_of(tensor);
  return dims.dense() ? Order::dense : dims.may_overlap() ? Order::overlapping : Order::strided;
}

// A dense copy of a tensor with gaps between its elements.
struct Copy {
  AtenTensorHandle original;
  Tensor dense;
};

// The tensors of a call, by element type.
struct Groups {
  std::array<std::vector<TensorSpan>, kElements> spans;
  std::vector<Copy> copies;
};

Groups group(const TensorList& tensors, int32_t device_index, bool writable) {
  const auto device_type = static_cast<int32_t>(cuda::kDeviceType);
  Groups groups;
  for (int64_t k = 0; k < tensors.size(); ++k) {
    AtenTensorHandle tensor = tensors[k];
    const auto element = static_cast<int>(element_of(tensor, "tensors", k, /*measures=*/!writable));
    int32_t its_type = 0;
    int32_t its_index = 0;
    int32_t layout = 0;
    TensorSpan span{nullptr, 0, k};
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &its_type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor, &its_index));
    STD_TORCH_CHECK(its_type == device_type && its_index == device_index, "tensors[", k, "]: needed device ",
                    cuda::kDeviceName, ":", device_index, ", got device type number ", its_type, ", index ", its_index);
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor, &layout));
    STD_TORCH_CHECK(layout == aoti_torch_layout_strided(), "tensors[", k,
                    "]: needed a strided layout, got layout number ", layout);
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(tensor, &span.numel));
    if (span.numel != 0) {
      const Order order = order_of(tensor);
      STD_TORCH_CHECK(!writable || order != Order::overlapping, "tensors[", k,
                      "]: needed elements that do not overlap in memory, got a tensor expanded or folded onto itself");
      AtenTensorHandle source = tensor;
      if (order != Order::dense) {
        AtenTensorHandle copy = nullptr;
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_clone(tensor, &copy));
        groups.copies.push_back({tensor, Tensor(copy)});
        source = copy;
      }
      if (writable) {
        void* data = nullptr;
        STABLE_TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(source, &data));
        span.data = data;
      } else {
        STABLE_TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(source, &span.data));
      }
      STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(span.data) % kBytes[element] == 0, "tensors[", k,
                      "]: needed data aligned to ", kBytes[element], " bytes, got address ", span.data);
    }
    groups.spans[element].push_back(span);
  }
  return groups;
}

// The flag that this thread's launches check before they take statistics; null for none.
thread_local struct {
  const int32_t* flag;
  int32_t device_index;
} condition = {nullptr, 0};

// Returns the flag if it is on this device, else null: a model on several devices is captured on one at a time.
const int32_t* enabled(int32_t device_index) {
  return device_index == condition.device_index ? condition.flag : nullptr;
}

// count_if(Tensor flag, bool on) -> ()
void count_if(Tensor flag, bool on) {
  STD_TORCH_CHECK(flag.numel() == 1, "flag: needed one element, got ", flag.numel());
  STD_TORCH_CHECK(flag.scalar_type() == torch::headeronly::ScalarType::Int, "flag: needed dtype int32, got ",
                  torch::headeronly::toString(flag.scalar_type()));
  condition = {on ? static_cast<const int32_t*>(flag.const_data_ptr()) : nullptr, flag.device().index()};
}

// grad_stats_into(Tensor[] tensors, Tensor(a!) out) -> ()
void grad_stats_into(StableIValue* stack, uint64_t, uint64_t) {
  const TensorList tensors(stack[0]);
  const auto out = torch::stable::detail::to<Tensor>(stack[1]);
  const int32_t device_index = device_index_of(out, "out");
  check_rows(out, tensors.size());
  count_write(out);
  const cuda::DeviceScope scope(device_index);
  const Groups groups = group(tensors, device_index, /*writable=*/false);

  // Launches on a stream run one after another, so all groups share the scratch space.
  int64_t n_partials = 0;
  for (int e = 0; e < kElements; ++e) {
    const auto& spans = groups.spans[e];
    n_partials = std::max(
        n_partials, cuda::count_partials(spans.data(), static_cast<int64_t>(spans.size()), static_cast<Element>(e)));
  }
  Stats* partials = nullptr;
  Tensor scratch;
  if (n_partials > 0) {
    scratch = torch::stable::empty({n_partials * static_cast<int64_t>(sizeof(Stats))},
                                   torch::headeronly::ScalarType::Byte, std::nullopt, out.device());
    partials = static_cast<Stats*>(scratch.mutable_data_ptr());
  }
  auto* rows = static_cast<double*>(out.mutable_data_ptr());  // [K, kStats]
  const cudaStream_t stream = cuda::current_stream(device_index);
  for (int e = 0; e < kElements; ++e) {
    const auto& spans = groups.spans[e];
    check_launch(cuda::grad_stats(spans.data(), static_cast<int64_t>(spans.size()), static_cast<Element>(e), partials,
                                  rows, enabled(device_index), stream),
                 "grad_stats_into", device_index);
  }
}

// magnitudes_into(Tensor[] tensors, Tensor(a!) out) -> ()
void magnitudes_into(StableIValue* stack, uint64_t, uint64_t) {
  const TensorList tensors(stack[0]);
  const auto out = torch::stable::detail::to<Tensor>(stack[1]);
  const int32_t device_index = device_index_of(out, "out");
  check_rows(out, tensors.size(), "out", kMagnitudeColumns);
  const cuda::DeviceScope scope(device_index);
  const Groups groups = group(tensors, device_index, /*writable=*/false);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(out.get()));  // the rows of empty tensors; counts as a write

  // Launches on a stream run one after another, so all groups share the scratch space.
  int64_t n_bytes = 0;
  for (int e = 0; e < kElements; ++e) {
    const auto& spans = groups.spans[e];
    n_bytes = std::max(
        n_bytes, cuda::magnitude_bytes(spans.data(), static_cast<int64_t>(spans.size()), static_cast<Element>(e)));
  }
  Tensor scratch = torch::stable::empty({n_bytes}, torch::headeronly::ScalarType::Byte, std::nullopt, out.device());
  auto* rows = static_cast<double*>(out.mutable_data_ptr());  // [K, kMagnitudeColumns]
  const cudaStream_t stream = cuda::current_stream(device_index);
  for (int e = 0; e < kElements; ++e) {
    const auto& spans = groups.spans[e];
    check_launch(cuda::magnitudes(spans.data(), static_cast<int64_t>(spans.size()), static_cast<Element>(e),
                                  scratch.mutable_data_ptr(), rows, stream),
                 "magnitudes_into", device_index);
  }
}

// scale_(Tensor(a!)[] tensors, Tensor coefficient) -> ()
void scale_(StableIValue* stack, uint64_t, uint64_t) {
  const TensorList tensors(stack[0]);
  const auto coefficient = torch::stable::detail::to<Tensor>(stack[1]);
  STD_TORCH_CHECK(coefficient.numel() == 1, "coefficient: needed one element, got ", coefficient.numel());
  const auto dtype = coefficient.scalar_type();
  STD_TORCH_CHECK(dtype == torch::headeronly::ScalarType::Float || dtype == torch::headeronly::ScalarType::Double,
                  "coefficient: needed dtype float32 or float64, got ", torch::headeronly::toString(dtype));
  const int32_t device_index = device_index_of(coefficient, "coefficient");
  const cuda::DeviceScope scope(device_index);
  const Groups groups = group(tensors, device_index, /*writable=*/true);
  const cudaStream_t stream = cuda::current_stream(device_index);
  for (int e = 0; e < kElements; ++e) {
    const auto& spans = groups.spans[e];
    if (spans.empty()) continue;
    check_launch(cuda::scale(spans.data(), static_cast<int64_t>(spans.size()), static_cast<Element>(e),
                             coefficient.const_data_ptr(),
                             dtype == torch::headeronly::ScalarType::Double ? Element::f64 : Element::f32, stream),
                 "scale_", device_index);
  }
  for (const Copy& copy : groups.copies) {
    AtenTensorHandle original = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(copy.original, &original));
    Tensor target(original);
    torch::stable::copy_(target, copy.dense);
  }
}

// clip_coefficient(Tensor rows, float max_norm) -> Tensor
Tensor clip_coefficient(Tensor rows, double max_norm) {
  const int32_t device_index = device_index_of(rows, "rows");
  check_rows(rows, rows.dim() > 0 ? rows.size(0) : 0, "rows");
  const cuda::DeviceScope scope(device_index);
  Tensor out = torch::stable::new_empty(rows, {2});
  check_launch(cuda::clip_coefficient(static_cast<const double*>(rows.const_data_ptr()), rows.size(0), max_norm,
                                      static_cast<double*>(out.mutable_data_ptr()), cuda::current_stream(device_index)),
               "clip_coefficient", device_index);
  return out;
}

// Checks the operands of a residual operator and returns their element type.
Element check_operands(const Tensor& a, const Tensor& b, const char* name_a, const char* name_b) {
  const Element element = element_of(a.get(), name_a);
  const int32_t device_index = device_index_of(a, name_a);
  STD_TORCH_CHECK(device_index_of(b, name_b) == device_index, name_b, ": needed device ", cuda::kDeviceName, ":",
                  device_index, ", that of ", name_a, ", got index ", b.device().index());
  check_alike(a, b, name_a, name_b);
  return element;
}

Tensor empty_partials(const Tensor& like, int64_t n_partials) {
  return torch::stable::empty({n_partials * static_cast<int64_t>(sizeof(Stats))}, torch::headeronly::ScalarType::Byte,
                              std::nullopt, like.device());
}

// Returns the raw rows [n, kStats] of dense tensors of one element type, on the device of `like`.
template <size_t n>
Tensor rows_of(const std::array<TensorSpan, n>& spans, Element element, const Tensor& like, const char* name) {
  const int32_t device_index = like.device().index();
  Tensor rows = torch::stable::new_empty(like, {int64_t{n}, int64_t{kStats}}, torch::headeronly::ScalarType::Double);
  Tensor partials = empty_partials(like, cuda::count_partials(spans.data(), n, element));
  check_launch(cuda::grad_stats(spans.data(), n, element, static_cast<Stats*>(partials.mutable_data_ptr()),
                                static_cast<double*>(rows.mutable_data_ptr()), enabled(device_index),
                                cuda::current_stream(device_index)),
               name, device_index);
  return rows;
}

// residual_add_stats(Tensor x, Tensor f, bool relu) -> (Tensor y, Tensor rows)
std::tuple<Tensor, Tensor> residual_add_stats(Tensor x, Tensor f, bool relu) {
  const Element element = check_operands(x, f, "x", "f");
  const int32_t device_index = x.device().index();
  const cuda::DeviceScope scope(device_index);
  std::optional<Tensor> y = empty_sum(x, f);
  if (!y) {
    y = sum_by_torch(x, f, relu);
    return {*y, rows_of<1>({TensorSpan{y->const_data_ptr(), y->numel(), 0}}, element, x, "residual_add_stats")};
  }
  Tensor rows = torch::stable::new_empty(x, {int64_t{1}, int64_t{kStats}}, torch::headeronly::ScalarType::Double);
  Tensor partials = empty_partials(x, cuda::count_partials(x.numel(), element));
  check_launch(cuda::residual_add(x.const_data_ptr(), f.const_data_ptr(), y->mutable_data_ptr(), x.numel(), element,
                                  relu, static_cast<Stats*>(partials.mutable_data_ptr()),
                                  static_cast<double*>(rows.mutable_data_ptr()), enabled(device_index),
                                  cuda::current_stream(device_index)),
               "residual_add_stats", device_index);
  return {*y, rows};
}

// residual_add_backward_stats(Tensor grad_y, Tensor? y) -> (Tensor grad_x, Tensor rows)
std::tuple<Tensor, Tensor> residual_add_backward_stats(Tensor grad_y, std::optional<Tensor> y) {
  const Element element =
      y ? check_operands(grad_y, *y, "grad_y", "y") : check_operands(grad_y, grad_y, "grad_y", "grad_y");
  const int32_t device_index = device_index_of(grad_y, "grad_y");
  const cuda::DeviceScope scope(device_index);
  Tensor grad_x = torch::stable::empty_like(y ? *y : grad_y);
  const Tensor incoming = in_order_of(grad_x, grad_y);
  if (!y || grad_x.numel() == 0) {
    torch::stable::copy_(grad_x, grad_y);
    const int64_t numel = grad_x.numel();
    return {grad_x,
            rows_of<2>({TensorSpan{incoming.const_data_ptr(), numel, 0}, TensorSpan{grad_x.const_data_ptr(), numel, 1}},
                       element, grad_x, "residual_add_backward_stats")};
  }
  const Tensor masking = in_order_of(grad_x, *y);
  Tensor rows = torch::stable::new_empty(grad_x, {int64_t{2}, int64_t{kStats}}, torch::headeronly::ScalarType::Double);
  Tensor partials = empty_partials(grad_x, 2 * cuda::count_partials(grad_x.numel(), element));
  check_launch(
      cuda::residual_add_backward(incoming.const_data_ptr(), masking.const_data_ptr(), grad_x.mutable_data_ptr(),
                                  grad_x.numel(), element, static_cast<Stats*>(partials.mutable_data_ptr()),
                                  static_cast<double*>(rows.mutable_data_ptr()), enabled(device_index),
                                  cuda::current_stream(device_index)),
      "residual_add_backward_stats", device_index);
  return {grad_x, rows};
}

// residual_branch_stats(Tensor branch, Tensor shortcut) -> Tensor rows
Tensor residual_branch_stats(Tensor branch, Tensor shortcut) {
  const Element element = check_operands(branch, shortcut, "branch", "shortcut");
  const int32_t device_index = branch.device().index();
  const cuda::DeviceScope scope(device_index);
  const int64_t numel = branch.numel();
  // Both operands need dense memory in the same order, whichever that is.
  const Tensor dense = numel == 0 || is_dense(branch) ? branch : torch::stable::contiguous(branch);
  const Tensor beside = numel == 0 ? shortcut : in_order_of(dense, shortcut);
  Tensor rows = torch::stable::new_empty(branch, {int64_t{2}, int64_t{kStats}}, torch::headeronly::ScalarType::Double);
  Tensor partials = empty_partials(branch, 2 * cuda::count_partials(numel, element));
  check_launch(cuda::branch_stats(dense.const_data_ptr(), beside.const_data_ptr(), numel, element,
                                  static_cast<Stats*>(partials.mutable_data_ptr()),
                                  static_cast<double*>(rows.mutable_data_ptr()), enabled(device_index),
                                  cuda::current_stream(device_index)),
               "residual_branch_stats", device_index);
  return rows;
}

// residual_add(Tensor x, Tensor f, bool relu) -> Tensor
Tensor residual_add(Tensor x, Tensor f, bool relu) {
  const Element element = check_operands(x, f, "x", "f");
  const int32_t device_index = x.device().index();
  const cuda::DeviceScope scope(device_index);
  std::optional<Tensor> y = empty_sum(x, f);
  if (!y) return sum_by_torch(x, f, relu);
  check_launch(cuda::residual_add(x.const_data_ptr(), f.const_data_ptr(), y->mutable_data_ptr(), x.numel(), element,
                                  relu, nullptr, nullptr, nullptr, cuda::current_stream(device_index)),
               "residual_add", device_index);
  return *y;
}

// residual_add_backward(Tensor grad_y, Tensor y) -> Tensor
Tensor residual_add_backward(Tensor grad_y, Tensor y) {
  const Element element = check_operands(grad_y, y, "grad_y", "y");
  const int32_t device_index = grad_y.device().index();
  const cuda::DeviceScope scope(device_index);
  Tensor grad_x = torch::stable::empty_like(y);
  if (grad_x.numel() == 0) return grad_x;
  const Tensor incoming = in_order_of(grad_x, grad_y);
  const Tensor masking = in_order_of(grad_x, y);
  check_launch(cuda::residual_add_backward(incoming.const_data_ptr(), masking.const_data_ptr(),
                                           grad_x.mutable_data_ptr(), grad_x.numel(), element, nullptr, nullptr,
                                           nullptr, cuda::current_stream(device_index)),
               "residual_add_backward", device_index);
  return grad_x;
}

}  // namespace
}  // namespace gradprobe

STABLE_TORCH_LIBRARY_IMPL(GRADPROBE_NAMESPACE, GRADPROBE_DISPATCH_KEY, m) {
  m.impl("grad_stats_into", &gradprobe::grad_stats_into);
  m.impl("magnitudes_into", &gradprobe::magnitudes_into);
  m.impl("scale_", &gradprobe::scale_);
  m.impl("clip_coefficient", TORCH_BOX(&gradprobe::clip_coefficient));
  m.impl("count_if", TORCH_BOX(&gradprobe::count_if));
  m.impl("residual_add", TORCH_BOX(&gradprobe::residual_add));
  m.impl("residual_add_backward", TORCH_BOX(&gradprobe::residual_add_backward));
  m.impl("residual_add_stats", TORCH_BOX(&gradprobe::residual_add_stats));
  m.impl("residual_add_backward_stats", TORCH_BOX(&gradprobe::residual_add_backward_stats));
  m.impl("residual_branch_stats", TORCH_BOX(&gradprobe::residual_branch_stats));
}
