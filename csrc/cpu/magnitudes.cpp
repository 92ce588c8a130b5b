// Counts the elements of a chunk by their exponents. The arithmetic is on bit patterns: of u = |x| as an integer, the
// exponent of u - 1 is k for every x in (2**k, 2**(k + 1)], so that a power of two falls below its own exponent.
#include "core/magnitudes.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/half.h"
#include "core/layout.h"
#include "cpu/kernels.h"

namespace gradprobe::cpu {
namespace {

constexpr int64_t kGroup = 4096;  // elements, read several times from L1

template <typename Float>
struct Format;

template <>
struct Format<float> {
  using Word = uint32_t;
  static constexpr int kFraction = 23, kBias = 127, kFields = 256;
};

template <>
struct Format<double> {
  using Word = uint64_t;
  static constexpr int kFraction = 52, kBias = 1023, kFields = 2048;
};

template <typename Float>
typename Format<Float>::Word magnitude_bits(Float x) {
  typename Format<Float>::Word bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & ~(typename Format<Float>::Word{1} << (8 * sizeof bits - 1));
}

// Calls each(data, n) for groups of the elements [begin, end) as float or double.
template <typename Each>
void for_each_group(const View& view, int64_t begin, int64_t end, const Each& each) {
  alignas(64) uint64_t gathered[kGroup];
  alignas(64) float widened[kGroup];
  const int64_t width = item_bytes(view.dtype);
  for (int64_t i = begin; i < end; i += kGroup) {
    const int64_t n = std::min(kGroup, end - i);
    if (is_float8(view.dtype)) {
      widen_float8(view, i, n, widened);
      each(static_cast<const float*>(widened), n);
      continue;
    }
    const void* data = static_cast<const char*>(view.data) + i * width;
    if (view.dims != nullptr) {
      data = gathered;
      const auto copy = [&](auto* out) {
        gather(static_cast<const std::remove_pointer_t<decltype(out)>*>(view.data), *view.dims, i, n, out);
      };
      if (width == 8) copy(gathered);
      if (width == 4) copy(reinterpret_cast<uint32_t*>(gathered));
      if (width == 2) copy(reinterpret_cast<uint16_t*>(gathered));
    }
    const auto* halves = static_cast<const uint16_t*>(data);
    switch (view.dtype) {
      case Dtype::kFloat64:
        each(static_cast<const double*>(data), n);
        continue;
      case Dtype::kFloat32:
        each(static_cast<const float*>(data), n);
        continue;
      case Dtype::kFloat16:
        for (int64_t j = 0; j < n; ++j) widened[j] = widen_float16(halves[j]);
        break;
      default:  // bfloat16
        for (int64_t j = 0; j < n; ++j) widened[j] = widen_bfloat16(halves[j]);
    }
    each(static_cast<const float*>(widened), n);
  }
}

// Counts the elements whose exponent field does not tell the bin: subnormal ones of float32, and those beside infinity,
// which is a power of two here.
template <typename Float>
void count_ends(const Float* data, int64_t n, int64_t* counts) {
  using F = Format<Float>;
  const typename F::Word infinity = magnitude_bits(static_cast<Float>(INFINITY));
  for (int64_t i = 0; i < n; ++i) {
    const typename F::Word u = magnitude_bits(data[i]);
    const typename F::Word field = (u - 1) >> F::kFraction;
    if (u == infinity) {
      ++counts[kCounts - 1];
    } else if (field == F::kFields - 2) {
      ++counts[column_of(F::kFields - 2 - F::kBias)];
    } else if (field == 0) {
      ++counts[column_of(std::ilogb(static_cast<double>(u) - 0.5) + 1 - F::kBias - F::kFraction)];
    }
  }
}

// Adds the second and fourth powers, at the scale of `moments`.
template <typename Float>
void add_powers(const Float* data, int64_t n, Moments& moments) {
  constexpr int kLanes = 8;
  const double unit = power_of_two(-moments.exponent);
  double sum_square[kLanes] = {}, sum_fourth[kLanes] = {};
  int64_t i = 0;
  const auto add = [&](int lane, double x) {
    const double square = x * x;
    sum_square[lane] += square;
    sum_fourth[lane] += square * square;
  };
  for (; i + kLanes <= n; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) add(lane, data[i + lane] * unit);
  }
  for (; i < n; ++i) add(0, data[i] * unit);
  for (int lane = 0; lane < kLanes; ++lane) {
    moments.sum_square += sum_square[lane];
    moments.sum_fourth += sum_fourth[lane];
  }
}

template <typename Float>
Moments count(const View& view, int64_t begin, int64_t end, int64_t* counts) {
  using F = Format<Float>;
  using Signed = std::make_signed_t<typename F::Word>;  // whose maximum every processor vectorises
  const auto groups = [&](const auto& each) {
    for_each_group(view, begin, end, [&](const auto* data, int64_t n) {
      if constexpr (std::is_same_v<decltype(data), const Float*>) each(data, n);
    });
  };
  // By the exponent field of u - 1, twice as many as there are since that of u = 0 wraps. Four tables, since an
  // addition to the counter of the element before would wait for that one.
  uint32_t table[4][2 * F::kFields] = {};
  Signed largest = 0;
  // In double, no fourth power of a float32 leaves the range, so that the scale need not be known first.
  constexpr bool kOnce = sizeof(Float) == 4;
  Moments moments{};
  groups([&](const Float* data, int64_t n) {
    const auto field = [&](int64_t i) { return (magnitude_bits(data[i]) - 1) >> F::kFraction; };
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
      for (int t = 0; t < 4; ++t) ++table[t][field(i + t)];
    }
    for (; i < n; ++i) ++table[0][field(i)];
    constexpr Signed kInfinity = Signed{F::kFields - 1} << F::kFraction;
    for (i = 0; i < n; ++i) {
      const auto u = static_cast<Signed>(magnitude_bits(data[i]));
      largest = std::max(largest, u < kInfinity ? u : Signed{0});
    }
    if (kOnce) add_powers(data, n, moments);
  });
  const auto total = [&](int f) { return int64_t{table[0][f]} + table[1][f] + table[2][f] + table[3][f]; };
  counts[0] += total(2 * F::kFields - 1);
  counts[kCounts - 1] += total(F::kFields - 1);
  for (int f = 1; f < F::kFields - 2; ++f) {
    if (const int64_t n = total(f)) counts[column_of(f - F::kBias)] += n;
  }
  if (total(0) + total(F::kFields - 2) > 0) {
    groups([&](const Float* data, int64_t n) { count_ends(data, n, counts); });
  }
  Float largest_value;
  std::memcpy(&largest_value, &largest, sizeof largest_value);
  moments.largest = static_cast<double>(largest_value);
  if (!kOnce) {
    moments.exponent = magnitude_exponent(moments.largest);
    groups([&](const Float* data, int64_t n) { add_powers(data, n, moments); });
  }
  return moments;
}

}  // namespace

Moments count_magnitudes(const View& view, int64_t begin, int64_t end, int64_t* counts) {
  return view.dtype == Dtype::kFloat64 ? count<double>(view, begin, end, counts)
                                       : count<float>(view, begin, end, counts);
}

}  // namespace gradprobe::cpu
