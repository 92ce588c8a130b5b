// The layout of a row of magnitudes, as gradprobe/ops/rows.py describes it, and the arithmetic of its numbers, for host
// and device.
#pragma once

#include <cstdint>

#include "core/stats.h"

namespace gradprobe {

inline constexpr int kLowestPower = -150;
inline constexpr int kHighestPower = 128;
inline constexpr int kBins = kHighestPower - kLowestPower + 2;
inline constexpr int kCounts = 1 + kBins + 1;          // zeros, bins, NaN and infinity
inline constexpr int kMagnitudeColumns = kCounts + 3;  // and the largest magnitude and both sums

// Over a power of two near the largest magnitude, no fourth power that matters leaves the range of double.
inline constexpr int kLowestExponent = -1000;
inline constexpr int kHighestExponent = 1000;

// Returns the exponent of the power of two over which elements of this largest magnitude are summed.
GRADPROBE_HD int magnitude_exponent(double largest) {
  const int exponent = static_cast<int>(abs_bits(largest) >> 52) - 1023;
  return exponent < kLowestExponent ? kLowestExponent : exponent > kHighestExponent ? kHighestExponent : exponent;
}

// Returns 2**exponent, for an exponent from -1022 to 1023.
GRADPROBE_HD double power_of_two(int exponent) { return double_of_bits(int64_t{exponent + 1023} << 52); }

// Returns the column that counts elements in (2**exponent, 2**(exponent + 1)].
GRADPROBE_HD int column_of(int exponent) {
  const int lowest = kLowestPower - 1;
  return 2 + (exponent < lowest ? lowest : exponent > kHighestPower ? kHighestPower : exponent) - kLowestPower;
}

// Returns the column that counts an element with these bits of |x|. A power of two falls below its own exponent, into
// that of the number before it.
GRADPROBE_HD int column_of_bits(int64_t bits) {
  if (bits == 0) return 0;
  if (bits >= kDoubleInfBits) return kCounts - 1;
  return column_of(static_cast<int>((bits - 1) >> 52) - 1023);
}

// What elements add to the numbers behind the counts.
struct Moments {
  double largest;  // finite magnitude
  int exponent;    // the sums are those of x * 2**-exponent
  double sum_square;
  double sum_fourth;
};

GRADPROBE_HD Moments no_moments() { return {0.0, kLowestExponent, 0.0, 0.0}; }

// Adds an element, given as x * 2**-moments.exponent, to the sums.
GRADPROBE_HD void add(Moments& moments, double scaled) {
  const double square = scaled * scaled;
  moments.sum_square += square;
  moments.sum_fourth += square * square;
}

// Brings the sums to an exponent, which is exact unless they underflow.
GRADPROBE_HD void rescale(Moments& moments, int exponent) {
  for (int shift = moments.exponent - exponent; shift != 0;) {
    const int step = shift < -250 ? -250 : shift > 250 ? 250 : shift;
    const double square = power_of_two(step) * power_of_two(step);
    moments.sum_square *= square;
    moments.sum_fourth *= square;
    moments.sum_fourth *= square;
    shift -= step;
  }
  moments.exponent = exponent;
}

// The moments of two groups together. Not associative to the last bit: callers merge in a fixed order.
GRADPROBE_HD Moments merge(Moments a, Moments b) {
  const int exponent = a.exponent > b.exponent ? a.exponent : b.exponent;
  rescale(a, exponent);
  rescale(b, exponent);
  return {a.largest > b.largest ? a.largest : b.largest, exponent, a.sum_square + b.sum_square,
          a.sum_fourth + b.sum_fourth};
}

// Writes the moments to a row [kMagnitudeColumns].
GRADPROBE_HD void finish(Moments moments, double* row) {
  rescale(moments, magnitude_exponent(moments.largest));
  row[kCounts] = moments.largest;
  row[kCounts + 1] = moments.sum_square;
  row[kCounts + 2] = moments.sum_fourth;
}

}  // namespace gradprobe
