// In-place multiplication on the CPU, in the caller's flush mode, like torch's mul_.
#include <algorithm>
#include <cstdint>

#include "core/half.h"
#include "core/layout.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"

#define GRADPROBE_PER_ISA "cpu/scale_loops.h"
#include "cpu/each_isa.h"

namespace gradprobe::cpu {
namespace {

void scale_dense(Dtype dtype, void* data, int64_t n, double coefficient, Isa isa) {
  const auto scale = GRADPROBE_CHOOSE(isa, scale_elements);
  scale(dtype, data, n, coefficient);
}

template <typename Word>
void scale_strided(const View& view, int64_t begin, int64_t end, double coefficient, Isa isa) {
  constexpr int64_t kBuffer = 16384 / sizeof(Word);
  alignas(64) Word buffer[kBuffer];
  auto* data = static_cast<Word*>(const_cast<void*>(view.data));
  for (int64_t i = begin; i < end; i += kBuffer) {
    const int64_t n = std::min(kBuffer, end - i);
    gather(data, *view.dims, i, n, buffer);
    scale_dense(view.dtype, buffer, n, coefficient, isa);
    scatter(buffer, *view.dims, i, n, data);
  }
}

}  // namespace

void scale_chunk(const View& view, int64_t begin, int64_t end, double coefficient, Isa isa) {
  const int64_t width = item_bytes(view.dtype);
  if (view.dims == nullptr) {
    char* data = static_cast<char*>(const_cast<void*>(view.data)) + begin * width;
    return scale_dense(view.dtype, data, end - begin, coefficient, isa);
  }
  if (width == 8) return scale_strided<uint64_t>(view, begin, end, coefficient, isa);
  if (width == 4) return scale_strided<uint32_t>(view, begin, end, coefficient, isa);
  scale_strided<uint16_t>(view, begin, end, coefficient, isa);
}

}  // namespace gradprobe::cpu
