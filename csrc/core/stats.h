// The one definition, for host and device, of the arithmetic of the six statistics (identity, add, merge, finish) and
// of clipping.
//
// Elements are added in one of two ways; partial results are merged in one:
//
//   FastSums  Float accumulators that an element passes at most kFastAdds of, accurate to a few float roundings if the
//             magnitudes of the group are in range (`fast_is_exact`). Any other group is scaled by a power of two, or
//             added again with `add(Stats&)`.
//   Stats     Double accumulators of x * 2**-range_exponent(abs_max), accurate for every finite float64.
//
// Source: Blue 1978, "A portable Fortran program to find the Euclidean norm of a vector", for the three ranges.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define GRADPROBE_HD __host__ __device__ __forceinline__
#else
#define GRADPROBE_HD inline
#endif

namespace gradprobe {

// Columns of a row, in the order of gradprobe.STATS, and their number.
enum Column : int { kSum, kSumAbs, kSumSq, kAbsMax, kNZero, kNNonfinite };
inline constexpr int kStats = kNNonfinite + 1;

// ---- Bit patterns. As integers, the bits of |x| sort like the numbers, infinity above all finite ones and NaN above
// infinity: their integer maximum is the largest magnitude and never loses a NaN.

GRADPROBE_HD int32_t abs_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_int(x) & 0x7fffffff;
#else
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & 0x7fffffff;
#endif
}

GRADPROBE_HD int64_t abs_bits(double x) {
#if defined(__CUDA_ARCH__)
  return __double_as_longlong(x) & 0x7fffffffffffffffLL;
#else
  int64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & 0x7fffffffffffffffLL;
#endif
}

GRADPROBE_HD float float_of_bits(int32_t bits) {
#if defined(__CUDA_ARCH__)
  return __int_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

GRADPROBE_HD double double_of_bits(int64_t bits) {
#if defined(__CUDA_ARCH__)
  return __longlong_as_double(bits);
#else
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

inline constexpr int32_t kFloatInfBits = 0x7f800000;
inline constexpr int64_t kDoubleInfBits = 0x7ff0000000000000LL;

GRADPROBE_HD bool is_finite(float x) { return abs_bits(x) < kFloatInfBits; }
GRADPROBE_HD bool is_finite(double x) { return abs_bits(x) < kDoubleInfBits; }

// ---- The range of a row.

// Returns the exponent e of a row, which holds the sums of x * 2**-e and depends on abs_max alone. Only float64 tensors
// of extreme magnitude have e != 0. With these limits no square of up to 2**63 elements overflows or loses digits.
GRADPROBE_HD int range_exponent(double abs_max) {
  if (!(abs_max > 0.0) || !is_finite(abs_max)) return 0;  // zero, NaN, infinity
  return abs_max > 0x1p+480 ? 600 : abs_max < 0x1p-480 ? -600 : 0;
}

// Returns the factor of `add(Stats&, x, factor)` for a group with largest magnitude `abs_max`. A group with NaN or
// infinity is scaled down so that its finite elements cannot overflow; its sums are non-finite either way.
GRADPROBE_HD double range_factor(double abs_max) {
  if (!is_finite(abs_max)) return 0x1p-600;
  const int exponent = range_exponent(abs_max);
  return exponent == 0 ? 1.0 : exponent > 0 ? 0x1p-600 : 0x1p+600;
}

// ---- Fast sums.

// The most additions that an element passes in float. Rounding: each errs by at most half a unit in the last place, so
// the relative error of sum_abs and sum_sq is at most n * 2**-24, and that of sum n * 2**-24 of sum_abs: 9.6e-7 for 16.
inline constexpr int kFastAdds = 16;

// Below kFastMin, squares may be subnormal and each lose 2**-150. Relative to kFastMin**2 = 2**-110, a group of fewer
// than 2**16 elements loses at most 2**-24; one of 32 whose magnitudes add up to kFastMin, 2**-25. Above kFastMax,
// squares overflow.
inline constexpr float kFastMin = 0x1p-55f;
inline constexpr float kFastMax = 0x1p+55f;

// Brings a group that is out of range into it, up from the smallest subnormal or, if divided by, down from infinity.
inline constexpr float kRescale = 0x1p+96f;

struct FastSums {
  float sum;
  float sum_abs;
  float sum_sq;
};

GRADPROBE_HD FastSums fast_sums(float x) { return {x, fabsf(x), x * x}; }

GRADPROBE_HD void add(FastSums& sums, float x) {
  sums.sum += x;
  sums.sum_abs += fabsf(x);
  sums.sum_sq += x * x;
}

GRADPROBE_HD FastSums merge(const FastSums& a, const FastSums& b) {
  return {a.sum + b.sum, a.sum_abs + b.sum_abs, a.sum_sq + b.sum_sq};
}

// Whether fast sums are accurate for a group of fewer than 2**16 elements with this largest magnitude, or for one of at
// most 2 * kFastAdds elements with this sum of magnitudes. False for NaN and infinity.
GRADPROBE_HD bool fast_is_exact(float magnitude) {
  return magnitude == 0.0f || (magnitude >= kFastMin && magnitude <= kFastMax);
}

// ---- Stats: a partial result for any number of elements.

struct Stats {
  double sum;      // of x * 2**-range_exponent(abs_max)
  double sum_abs;  // of |x| * 2**-range_exponent(abs_max)
  double sum_sq;   // of (x * 2**-range_exponent(abs_max))**2
  double abs_max;  // NaN if any element is NaN, else infinity if any is infinite
  int64_t n_zero;
  int64_t n_nonfinite;
};

GRADPROBE_HD Stats identity() { return {0.0, 0.0, 0.0, 0.0, 0, 0}; }

// Adds x to a group of known largest magnitude; `factor` is range_factor of that magnitude. The caller must add the
// element of that magnitude too, or the sums do not match abs_max.
GRADPROBE_HD void add(Stats& stats, double x, double factor) {
  const double magnitude = double_of_bits(abs_bits(x));
  const double scaled = x * factor;
  stats.sum += scaled;
  stats.sum_abs += magnitude * factor;
  stats.sum_sq += scaled * scaled;
  if (magnitude > stats.abs_max || magnitude != magnitude) stats.abs_max = magnitude;
  stats.n_zero += magnitude == 0.0;
  stats.n_nonfinite += !is_finite(magnitude);
}

GRADPROBE_HD double max_magnitude(double a, double b) {
  return (a > b || a != a) ? a : b;  // NaN if either is
}

// Rescales the sums from exponent `from` to exponent `to`, in steps that are exact powers of two.
GRADPROBE_HD void rescale(Stats& stats, int from, int to) {
  for (; from < to; from += 600) {
    stats.sum *= 0x1p-600;
    stats.sum_abs *= 0x1p-600;
    stats.sum_sq *= 0x1p-600;
    stats.sum_sq *= 0x1p-600;
  }
}

// The statistics of two groups together whose sums have the same exponent. Groups of float and of narrower types do.
// Not associative to the last bit: callers merge in a fixed order.
GRADPROBE_HD Stats merge_alike(const Stats& a, const Stats& b) {
  return {a.sum + b.sum,       a.sum_abs + b.sum_abs,        a.sum_sq + b.sum_sq, max_magnitude(a.abs_max, b.abs_max),
          a.n_zero + b.n_zero, a.n_nonfinite + b.n_nonfinite};
}

// The statistics of any two groups together.
GRADPROBE_HD Stats merge(Stats a, Stats b) {
  const double abs_max = max_magnitude(a.abs_max, b.abs_max);
  // With a NaN or an infinity the sums are non-finite whatever the exponents, so they need no rescaling.
  if (is_finite(abs_max)) {
    const int exponent = range_exponent(abs_max);
    // A group of zeros has exponent 0, and scaling does not change its sums.
    rescale(a, range_exponent(a.abs_max), exponent);
    rescale(b, range_exponent(b.abs_max), exponent);
  }
  return merge_alike(a, b);
}

// Writes the statistics to a raw row [kStats]. Counts are exact up to 2**53.
GRADPROBE_HD void finish(const Stats& stats, double* row) {
  row[kSum] = stats.sum;
  row[kSumAbs] = stats.sum_abs;
  row[kSumSq] = stats.sum_sq;
  row[kAbsMax] = stats.abs_max;
  row[kNZero] = static_cast<double>(stats.n_zero);
  row[kNNonfinite] = static_cast<double>(stats.n_nonfinite);
}

// Reads the sums of a raw row [kStats], without its counts.
GRADPROBE_HD Stats sums_of(const double* row) { return {row[kSum], row[kSumAbs], row[kSumSq], row[kAbsMax], 0, 0}; }

// ---- Clipping to a norm.

// Writes the Euclidean norm of all elements, and the factor that clips it to max_norm, to out [2]. As in
// torch.nn.utils.clip_grad_norm_, the factor is NaN if the norm is.
GRADPROBE_HD void write_clip(const Stats& all, double max_norm, double* out) {
  const int exponent = range_exponent(all.abs_max);
  const double norm = sqrt(all.sum_sq) * (exponent > 0 ? 0x1p+600 : exponent < 0 ? 0x1p-600 : 1.0);
  const double factor = max_norm / (norm + 1e-6);
  out[0] = norm;
  out[1] = factor > 1.0 ? 1.0 : factor;
}

}  // namespace gradprobe
