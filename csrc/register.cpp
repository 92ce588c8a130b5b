// The CPU implementations of gradprobe's operators, registered with torch through its stable ABI: argument checks,
// torch's thread pool.
//
// The kernels take the boxed stack itself: with a thousand small tensors, wrapping each in a shared pointer would cost
// as much as the statistics.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <deque>
#include <vector>

#include "arguments.h"
#include "chunks.h"
#include "cpu/float_env.h"
#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "stats.h"

namespace gradprobe {
namespace {

using cpu::Dims;
using cpu::Dtype;
using cpu::View;

// Below this many elements in all, waking other threads costs more than they bring.
constexpr int64_t kSerialNumel = 65536;
// What starting on a tensor costs, in elements.
constexpr int64_t kTensorNumel = 256;

// The tensors of a call, and their chunks.
struct Work {
  std::vector<View> views;
  std::deque<Dims> dims;  // of those that are not dense; a deque, so that views can point into it
  std::vector<int64_t> first_chunk;
  int64_t n_chunks = 0;
  int64_t cost_numel = 0;
};

Dtype dtype_of(AtenTensorHandle tensor, int64_t k) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &dtype));
  if (dtype == aoti_torch_dtype_float32()) return Dtype::kFloat32;
  if (dtype == aoti_torch_dtype_float16()) return Dtype::kFloat16;
  if (dtype == aoti_torch_dtype_bfloat16()) return Dtype::kBFloat16;
  if (dtype == aoti_torch_dtype_float64()) return Dtype::kFloat64;
  STD_TORCH_CHECK(false, "tensors[", k, "]: needed a dtype of float16, bfloat16, float32, float64, got dtype number ",
                  dtype, " (torch's own numbering)");
}

Work plan(const TensorList& tensors, bool writable) {
  static const int32_t kCpu = aoti_torch_device_type_cpu();
  static const int32_t kStrided = aoti_torch_layout_strided();
  const int64_t n_tensors = tensors.size();
  Work work;
  work.views.reserve(n_tensors);
  work.first_chunk.resize(n_tensors + 1);
  for (int64_t k = 0; k < n_tensors; ++k) {
    AtenTensorHandle tensor = tensors[k];
    int32_t device = 0;
    int32_t layout = 0;
    View view{nullptr, dtype_of(tensor, k), 0, nullptr};
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &device));
    STD_TORCH_CHECK(device == kCpu, "tensors[", k, "]: needed device cpu, got device type number ", device);
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor, &layout));
    STD_TORCH_CHECK(layout == kStrided, "tensors[", k, "]: needed a strided layout, got layout number ", layout);
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(tensor, &view.numel));
    if (view.numel != 0) {
      bool is_contiguous = false;
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(tensor, &is_contiguous));
      if (!is_contiguous) {
        int64_t n_dims = 0;
        int64_t* sizes = nullptr;
        int64_t* strides = nullptr;
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &n_dims));
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &sizes));
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &strides));
        const Dims reduced = cpu::reduce_dims(sizes, strides, n_dims);
        STD_TORCH_CHECK(
            !writable || !reduced.may_overlap(), "tensors[", k,
            "]: needed elements that do not overlap in memory, got a tensor expanded or folded onto itself");
        if (!reduced.dense()) view.dims = &work.dims.emplace_back(reduced);
      }
      if (writable) {
        void* data = nullptr;
        STABLE_TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(tensor, &data));
        view.data = data;
      } else {
        STABLE_TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(tensor, &view.data));
      }
    }
    work.first_chunk[k] = work.n_chunks;
    work.n_chunks += count_chunks(view.numel, cpu::kChunkNumel);
    work.cost_numel += view.numel + kTensorNumel;
    work.views.push_back(view);
  }
  work.first_chunk[n_tensors] = work.n_chunks;
  return work;
}

struct CallersEnvironment {
  CallersEnvironment() {}
};

// Calls each(chunk_number, chunk) for every chunk, on torch's threads, in the given floating-point environment. Threads
// take batches as they get free; what a chunk is does not depend on that.
template <typename Environment, typename Each>
void for_each_chunk(const Work& work, const Each& each) {
  const int64_t n_tensors = static_cast<int64_t>(work.views.size());
  const auto run = [&](int64_t begin, int64_t end) {
    const Environment environment;
    int64_t k = find_tensor(work.first_chunk.data(), n_tensors, begin);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (work.first_chunk[k + 1] <= chunk) ++k;
      each(chunk, chunk_range(k, work.views[k].numel, work.first_chunk[k], chunk, cpu::kChunkNumel));
    }
  };
  if (work.n_chunks == 0) return;
  const int64_t n_threads = torch::stable::get_num_threads();
  if (n_threads == 1 || work.n_chunks == 1 || work.cost_numel <= kSerialNumel) return run(0, work.n_chunks);
  const int64_t batch = std::max<int64_t>(1, work.n_chunks * cpu::kChunkNumel / work.cost_numel);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, n_threads, 1, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(batch, std::memory_order_relaxed)) < work.n_chunks;) {
      run(begin, std::min(begin + batch, work.n_chunks));
    }
  });
}

// grad_stats_into(Tensor[] tensors, Tensor(a!) out) -> ()
void grad_stats_into(StableIValue* stack, uint64_t, uint64_t) {
  const TensorList tensors(stack[0]);
  const auto out = torch::stable::detail::to<torch::stable::Tensor>(stack[1]);
  const int64_t n_tensors = tensors.size();
  STD_TORCH_CHECK(out.is_cpu(), "out: needed device cpu, that of tensors, got another");
  check_rows(out, n_tensors);
  // As in count_write, but with all of its few elements: making a view would take four times as long.
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(out.get()));
  const Work work = plan(tensors, /*writable=*/false);
  const cpu::Isa isa = cpu::best_isa();
  std::vector<Stats> partials(work.n_chunks);
  for_each_chunk<cpu::FloatEnvironment>(work, [&](int64_t number, const Chunk& chunk) {
    partials[number] = cpu::chunk_stats(work.views[chunk.tensor], chunk.begin, chunk.end, isa);
  });
  const cpu::FloatEnvironment environment;
  auto* rows = static_cast<double*>(out.mutable_data_ptr());  // [K, kStats]
  for (int64_t k = 0; k < n_tensors; ++k) {
    Stats stats = identity();
    for (int64_t chunk = work.first_chunk[k]; chunk < work.first_chunk[k + 1]; ++chunk)
      stats = merge(stats, partials[chunk]);
    finish(stats, rows + k * kStats);
  }
}

double coefficient_of(const torch::stable::Tensor& coefficient) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(coefficient.numel() == 1, "coefficient: needed one element, got ", coefficient.numel());
  STD_TORCH_CHECK(coefficient.is_cpu(), "coefficient: needed device cpu, that of tensors, got another");
  const ScalarType dtype = coefficient.scalar_type();
  if (dtype == ScalarType::Float) return *static_cast<const float*>(coefficient.const_data_ptr());
  STD_TORCH_CHECK(dtype == ScalarType::Double, "coefficient: needed dtype float32 or float64, got ",
                  torch::headeronly::toString(dtype));
  return *static_cast<const double*>(coefficient.const_data_ptr());
}

// scale_(Tensor(a!)[] tensors, Tensor coefficient) -> ()
void scale_(StableIValue* stack, uint64_t, uint64_t) {
  const TensorList tensors(stack[0]);
  const double coefficient = coefficient_of(torch::stable::detail::to<torch::stable::Tensor>(stack[1]));
  const Work work = plan(tensors, /*writable=*/true);
  const cpu::Isa isa = cpu::best_isa();
  for_each_chunk<CallersEnvironment>(work, [&](int64_t, const Chunk& chunk) {
    cpu::scale_chunk(work.views[chunk.tensor], chunk.begin, chunk.end, coefficient, isa);
  });
}

}  // namespace
}  // namespace gradprobe

STABLE_TORCH_LIBRARY_IMPL(gradprobe, CPU, m) {
  m.impl("grad_stats_into", &gradprobe::grad_stats_into);
  m.impl("scale_", &gradprobe::scale_);
}
