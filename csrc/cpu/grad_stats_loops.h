// The vector loops of grad_stats for one instruction set (see each_isa.h).
#include "cpu/vectors.h"

#define GRADPROBE_INLINE static inline __attribute__((always_inline))

namespace gradprobe::cpu::GRADPROBE_ISA {

// Registers per sum, to hide the latency of an addition. More if the processor has 32 registers.
#if GRADPROBE_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kUnroll = 4;
#else
constexpr int kUnroll = 2;
#endif
constexpr int kBlock = kUnroll * kFloats;

// Float accumulators are flushed to double ones after this many blocks; the last flush may include the padded tail as
// one more block. An element then passes at most kFlush roundings in its lane (the first addition, to zero, is exact)
// and two more when four registers are summed. At 2**-24 each, plus that of the square on machines without FMA, the
// relative error is at most 9.6e-7 for sum_abs, 1.01e-6 for sum_sq and so 5.1e-7 for the norm, whatever the data
// (including constant inputs, where all roundings go the same way), and typically 1e-8. The signed sum errs by at
// most 9.6e-7 of sum_abs; with random signs by about 6e-8 * sqrt(n) * rms, i.e. 6e-8 of its standard deviation. Adding
// in double takes 1.8 times as long in cache (measured on Zen 4).
constexpr int kFlush = 14;
static_assert(kFlush + 2 <= kFastAdds);

// Elements of a group, whose largest magnitude decides whether it is added again: 16 KiB of float32 or float64, so that
// the second read hits L1.
constexpr int64_t kGroup = 4096;  // few enough for 16-bit counters
constexpr int64_t kDoubleGroup = 2048;

// ---- Operations that compilers do not vectorise well by themselves.

// Loads two registers of elements, in any order.
GRADPROBE_INLINE void load_pair(const float* from, Floats& a, Floats& b) {
  a = load<Floats>(from);
  b = load<Floats>(from + kFloats);
}

GRADPROBE_INLINE void load_pair(const BFloat16* from, Floats& a, Floats& b) {
  // A bfloat16 is the upper half of a float32: split even and odd elements instead of widening. Works for any
  // endianness.
  const Ints two_per_lane = load<Ints>(from);
  a = (Floats)(two_per_lane << 16);
  b = (Floats)(two_per_lane & ~0xffff);
}

#if GRADPROBE_VECTOR_BYTES == 64

GRADPROBE_INLINE void load_pair(const Float16* from, Floats& a, Floats& b) {
  a = (Floats)_mm512_cvtph_ps(load<__m256i>(from));
  b = (Floats)_mm512_cvtph_ps(load<__m256i>(from + kFloats));
}
GRADPROBE_INLINE Doubles low(Floats x) { return (Doubles)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x)); }
GRADPROBE_INLINE Doubles high(Floats x) { return (Doubles)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1)); }

// Counts in general registers, which are otherwise idle.
using Count = int64_t;
GRADPROBE_INLINE Count count_nonzero(Ints magnitude_a, Ints magnitude_b) {
  return __builtin_popcount(_mm512_test_epi32_mask((__m512i)magnitude_a, (__m512i)magnitude_a)) +
         __builtin_popcount(_mm512_test_epi32_mask((__m512i)magnitude_b, (__m512i)magnitude_b));
}

#elif GRADPROBE_VECTOR_BYTES == 32

GRADPROBE_INLINE void load_pair(const Float16* from, Floats& a, Floats& b) {
  a = (Floats)_mm256_cvtph_ps(load<__m128i>(from));
  b = (Floats)_mm256_cvtph_ps(load<__m128i>(from + kFloats));
}
GRADPROBE_INLINE Doubles low(Floats x) { return (Doubles)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x)); }
GRADPROBE_INLINE Doubles high(Floats x) { return (Doubles)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1)); }

// Counts in 16-bit lanes, two registers of elements at a time.
using Count = Shorts;
GRADPROBE_INLINE Count count_nonzero(Ints magnitude_a, Ints magnitude_b) {
  const __m256i packed = _mm256_packus_epi32((__m256i)magnitude_a, (__m256i)magnitude_b);
  return (Count)_mm256_min_epu16(packed, (__m256i)(Count{} + 1));
}

#else

// Converts the float16 in the low half of each lane to float32.
GRADPROBE_INLINE Floats widen_half(Ints bits) {
  const Ints magnitude = (bits & 0x7fff) << 13;
  // Changes the exponent's bias from 15 to 127, exactly for subnormal numbers too. Infinity and NaN get their exponent
  // separately.
  const Ints finite = (Ints)((Floats)magnitude * 0x1p+112f);
  const Ints is_nonfinite = magnitude >= (0x7c00 << 13);
  return (Floats)(finite | (is_nonfinite & kFloatInfBits) | ((bits & 0x8000) << 16));
}
GRADPROBE_INLINE void load_pair(const Float16* from, Floats& a, Floats& b) {
#if defined(__aarch64__)
  const float16x8_t halves = (float16x8_t)load<Shorts>(from);
  a = (Floats)vcvt_f32_f16(vget_low_f16(halves));
  b = (Floats)vcvt_high_f32_f16(halves);
#else
  const Ints two_per_lane = load<Ints>(from);
  a = widen_half(two_per_lane);
  b = widen_half(two_per_lane >> 16);
#endif
}
GRADPROBE_INLINE Doubles low(Floats x) { return Doubles{x[0], x[1]}; }
GRADPROBE_INLINE Doubles high(Floats x) { return Doubles{x[2], x[3]}; }

using Count = Ints;
GRADPROBE_INLINE Count count_nonzero(Ints magnitude_a, Ints magnitude_b) {
  return -((magnitude_a != 0) + (magnitude_b != 0));
}

#endif

template <typename Vector>
GRADPROBE_INLINE Vector larger(Vector a, Vector b) {
  return a > b ? a : b;
}

template <typename Vector>
GRADPROBE_INLINE auto sum_of_lanes(Vector vector) {
  constexpr int n = sizeof(Vector) / sizeof(vector[0]);
  decltype(+vector[0]) total = 0;
  for (int i = 0; i < n; ++i) total += vector[i];
  return total;
}

GRADPROBE_INLINE int64_t sum_of_lanes(int64_t count) { return count; }

template <typename Vector>
GRADPROBE_INLINE auto largest_lane(Vector vector) {
  constexpr int n = sizeof(Vector) / sizeof(vector[0]);
  auto largest = vector[0];
  for (int i = 1; i < n; ++i) largest = vector[i] > largest ? vector[i] : largest;
  return largest;
}

// Adds the registers of an array, pairwise.
template <typename Vector>
GRADPROBE_INLINE Vector sum_of_registers(const Vector (&lanes)[kUnroll]) {
  if constexpr (kUnroll == 2) {
    return lanes[0] + lanes[1];
  } else {
    return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  }
}

template <typename Vector>
GRADPROBE_INLINE Vector largest_register(const Vector (&lanes)[kUnroll]) {
  if constexpr (kUnroll == 2) {
    return larger(lanes[0], lanes[1]);
  } else {
    return larger(larger(lanes[0], lanes[1]), larger(lanes[2], lanes[3]));
  }
}

// Double accumulators of a chunk of float32 or half-precision elements, whose range exponent is always 0.
struct Totals {
  Doubles sum{};
  Doubles sum_abs{};
  Doubles sum_sq{};
  int32_t abs_max_bits = 0;
  int64_t n_zero = 0;
  int64_t n_nonfinite = 0;
};

GRADPROBE_INLINE void flush(Floats (&lanes)[kUnroll], Doubles& total) {
  const Floats sum = sum_of_registers(lanes);
  total += low(sum) + high(sum);
}

// Called when the float accumulators are flushed; overloaded for a source that has accumulators of its own.
template <typename Source>
GRADPROBE_INLINE void flush_own(const Source& /*source*/) {}

// Fetches what is read 2 KiB later, as a processor's own prefetching ends with each page of 4 KiB. Tensors of 2 to 8
// MiB that have just been written take 15 to 35 % less time on a Xeon with AVX-512, with any distance from 1 to 4 KiB.
// Overloaded for a source; those that also write gain nothing.
template <typename Source>
GRADPROBE_INLINE void prefetch(const Source& /*source*/) {}

template <typename T>
GRADPROBE_INLINE void prefetch(const T* from) {
  constexpr int64_t kAhead = 2048, kLine = 64;
  for (int64_t line = 0; line < static_cast<int64_t>(kBlock * sizeof(T)); line += kLine) {
    __builtin_prefetch(reinterpret_cast<const char*>(from) + kAhead + line);
  }
}

// Adds a full block to the float accumulators. A source is a pointer or a class like one: load_pair() reads two
// registers from it, and + advances it.
template <typename Source>
GRADPROBE_INLINE void add_block(Source data, Floats (&sum)[kUnroll], Floats (&sum_abs)[kUnroll],
                                Floats (&sum_sq)[kUnroll], Ints (&abs_max)[kUnroll], Count& nonzero) {
  Ints magnitude[kUnroll];
  Floats x[kUnroll];
  for (int u = 0; u < kUnroll; u += 2) load_pair(data + u * kFloats, x[u], x[u + 1]);
#pragma GCC unroll 4
  for (int u = 0; u < kUnroll; ++u) {
    magnitude[u] = (Ints)x[u] & 0x7fffffff;
    sum[u] += x[u];
    sum_abs[u] += (Floats)magnitude[u];
    sum_sq[u] += x[u] * x[u];
    abs_max[u] = larger(abs_max[u], magnitude[u]);
  }
  for (int u = 0; u < kUnroll; u += 2) nonzero += count_nonzero(magnitude[u], magnitude[u + 1]);
}

// Loads the last elements of a source, fewer than a block, and leaves the zeros after them.
template <typename T>
GRADPROBE_INLINE void load_tail(const T* from, int64_t n, T (&tail)[kBlock]) {
  __builtin_memcpy(tail, from, n * sizeof(T));
}

// Adds a group in float. Returns false, and adds nothing, if its magnitudes do not allow that. T: type of the tail's
// elements.
template <typename T, typename Source>
GRADPROBE_INLINE bool add_fast(Source data, int64_t n, Totals& totals) {
  Doubles sum{}, sum_abs{}, sum_sq{};
  Ints abs_max[kUnroll] = {};
  Count nonzero{};
  int64_t blocks = n / kBlock;
  const int64_t n_tail = n % kBlock;
  Source at = data;
  while (true) {
    const int64_t burst = blocks < kFlush ? blocks : kFlush;
    blocks -= burst;
    Floats sums[3][kUnroll] = {};
    for (const Source end = at + burst * kBlock; at != end; at = at + kBlock) {
      prefetch(at);
      add_block(at, sums[0], sums[1], sums[2], abs_max, nonzero);
    }
    const bool is_last = blocks == 0;
    if (is_last && n_tail != 0) {
      // Padding with zeros changes only the number of zeros, which is computed as n - nonzero.
      T tail[kBlock] = {};
      load_tail(at, n_tail, tail);
      add_block<const T*>(tail, sums[0], sums[1], sums[2], abs_max, nonzero);
    }
    flush(sums[0], sum);
    flush(sums[1], sum_abs);
    flush(sums[2], sum_sq);
    flush_own(at);
    if (is_last) break;
  }
  const int32_t largest = largest_lane(largest_register(abs_max));
  if (!fast_is_exact(float_of_bits(largest))) return false;
  totals.sum += sum;
  totals.sum_abs += sum_abs;
  totals.sum_sq += sum_sq;
  totals.abs_max_bits = largest > totals.abs_max_bits ? largest : totals.abs_max_bits;
  totals.n_zero += n - sum_of_lanes(nonzero);
  return true;
}

// Adds a register of elements in double.
GRADPROBE_INLINE void add_exact(Floats x, Totals& totals, Ints& abs_max, Ints& nonzero, Ints& nonfinite) {
  const Ints magnitude = (Ints)x & 0x7fffffff;
  const Doubles low_x = low(x);
  const Doubles high_x = high(x);
  totals.sum += low_x + high_x;
  totals.sum_abs += low((Floats)magnitude) + high((Floats)magnitude);
  totals.sum_sq += low_x * low_x + high_x * high_x;
  abs_max = larger(abs_max, magnitude);
  nonzero -= magnitude != 0;
  nonfinite -= magnitude >= kFloatInfBits;
}

// Adds a group of any magnitudes, including NaN and infinity: in double no square of a float32 overflows or loses
// digits.
template <typename T>
__attribute__((noinline)) static void add_exact(const T* data, int64_t n, Totals& totals) {
  Ints abs_max{}, nonzero{}, nonfinite{};
  int64_t i = 0;
  const auto add_pair = [&](const T* from) __attribute__((always_inline)) {
    Floats a, b;
    load_pair(from, a, b);
    add_exact(a, totals, abs_max, nonzero, nonfinite);
    add_exact(b, totals, abs_max, nonzero, nonfinite);
  };
  for (; i + 2 * kFloats <= n; i += 2 * kFloats) add_pair(data + i);
  if (i < n) {
    T tail[2 * kFloats] = {};
    __builtin_memcpy(tail, data + i, (n - i) * sizeof(T));
    add_pair(tail);
  }
  const int32_t largest = largest_lane(abs_max);
  totals.abs_max_bits = largest > totals.abs_max_bits ? largest : totals.abs_max_bits;
  totals.n_zero += n - sum_of_lanes(nonzero);
  totals.n_nonfinite += sum_of_lanes(nonfinite);
}

GRADPROBE_INLINE Stats finished(const Totals& totals) {
  return {sum_of_lanes(totals.sum),
          sum_of_lanes(totals.sum_abs),
          sum_of_lanes(totals.sum_sq),
          static_cast<double>(float_of_bits(totals.abs_max_bits)),
          totals.n_zero,
          totals.n_nonfinite};
}

template <typename T>
static Stats stats_of(const T* data, int64_t n) {
  Totals totals;
  for (int64_t begin = 0; begin < n; begin += kGroup) {
    const int64_t count = n - begin < kGroup ? n - begin : kGroup;
    if (!add_fast<T>(data + begin, count, totals)) add_exact(data + begin, count, totals);
  }
  return finished(totals);
}

struct DoubleSums {
  Doubles sum[kUnroll] = {};
  Doubles sum_abs[kUnroll] = {};
  Doubles sum_sq[kUnroll] = {};
  Longs abs_max[kUnroll] = {};
  Longs nonzero[kUnroll] = {};
  Longs nonfinite[kUnroll] = {};

  template <bool kScaled>
  __attribute__((always_inline)) void add(int u, Doubles x, double factor) {
    const Longs magnitude = (Longs)x & 0x7fffffffffffffffLL;
    abs_max[u] = larger(abs_max[u], magnitude);
    nonzero[u] -= magnitude != 0;
    Doubles abs_x = (Doubles)magnitude;
    if (kScaled) {
      nonfinite[u] -= magnitude >= kDoubleInfBits;
      x *= factor;
      abs_x *= factor;
    }
    sum[u] += x;
    sum_abs[u] += abs_x;
    sum_sq[u] += x * x;
  }
};

// Returns the statistics of a group of float64, times `factor` if kScaled. Non-finite elements are counted only if
// kScaled: the caller adds such a group again.
template <bool kScaled>
static Stats add_doubles(const double* data, int64_t n, double factor) {
  constexpr int64_t kDoubleBlock = kUnroll * kDoubles;
  DoubleSums sums;
  int64_t i = 0;
  for (; i + kDoubleBlock <= n; i += kDoubleBlock) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) sums.template add<kScaled>(u, load<Doubles>(data + i + u * kDoubles), factor);
  }
  if (i < n) {
    double tail[kDoubleBlock] = {};
    __builtin_memcpy(tail, data + i, (n - i) * sizeof(double));
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) sums.template add<kScaled>(u, load<Doubles>(tail + u * kDoubles), factor);
  }
  return {
      sum_of_lanes(sum_of_registers(sums.sum)),         sum_of_lanes(sum_of_registers(sums.sum_abs)),
      sum_of_lanes(sum_of_registers(sums.sum_sq)),      double_of_bits(largest_lane(largest_register(sums.abs_max))),
      n - sum_of_lanes(sum_of_registers(sums.nonzero)), sum_of_lanes(sum_of_registers(sums.nonfinite))};
}

static Stats stats_of(const double* data, int64_t n) {
  Stats stats = identity();
  for (int64_t begin = 0; begin < n; begin += kDoubleGroup) {
    const int64_t count = n - begin < kDoubleGroup ? n - begin : kDoubleGroup;
    Stats group = add_doubles<false>(data + begin, count, 1.0);
    const double factor = range_factor(group.abs_max);
    if (factor != 1.0) group = add_doubles<true>(data + begin, count, factor);
    stats = merge(stats, group);
  }
  return stats;
}

static Stats elements_stats(Dtype dtype, const void* data, int64_t n) {
  switch (dtype) {
    case Dtype::kFloat16:
      return stats_of(static_cast<const Float16*>(data), n);
    case Dtype::kBFloat16:
      return stats_of(static_cast<const BFloat16*>(data), n);
    case Dtype::kFloat32:
      return stats_of(static_cast<const float*>(data), n);
    default:  // float64
      return stats_of(static_cast<const double*>(data), n);
  }
}

}  // namespace gradprobe::cpu::GRADPROBE_ISA

#undef GRADPROBE_INLINE
