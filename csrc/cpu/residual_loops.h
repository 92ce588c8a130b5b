// The loops of residual_add for one instruction set (see each_isa.h). Loops without statistics are vectorised by the
// compiler. For float32 with statistics, the loops of grad_stats compute, store and count elements while in registers.
#include "cpu/branch_loops.h"

#define GRADPROBE_INLINE static inline __attribute__((always_inline))

namespace gradprobe::cpu::GRADPROBE_ISA {

// Like torch.relu on the CPU, keeps NaN and -0.
template <bool kRelu, typename T>
static inline T join(T x, T f) {
  const T sum = x + f;
  return kRelu && sum < 0 ? T{0} : sum;
}

// No pointer is restricted because y may be x or f. An element depends only on those with the same index.
template <bool kRelu, typename T>
static void add(const T* x, const T* f, T* y, int64_t n) {
  GRADPROBE_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) y[i] = join<kRelu>(x[i], f[i]);
}

template <bool kRelu>
static void add_bfloat16(const uint16_t* x, const uint16_t* f, uint16_t* y, int64_t n) {
  GRADPROBE_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    y[i] = narrow_to_bfloat16(join<kRelu>(widen_bfloat16(x[i]), widen_bfloat16(f[i])));
  }
}

template <bool kRelu>
static void add_float16(const uint16_t* x, const uint16_t* f, uint16_t* y, int64_t n) {
  int64_t i = 0;
#if GRADPROBE_HAS_F16C
  for (; i + 8 <= n; i += 8) {
    const __m256 of_x = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i)));
    const __m256 of_f = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(f + i)));
    __m256 sum = _mm256_add_ps(of_x, of_f);
    if (kRelu) sum = _mm256_max_ps(_mm256_setzero_ps(), sum);  // returns its second operand for NaN and for two zeros
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i),
                     _mm256_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#endif
  for (; i < n; ++i) y[i] = narrow_to_float16(join<kRelu>(widen_float16(x[i]), widen_float16(f[i])));
}

template <bool kRelu>
static void add(Dtype dtype, const void* x, const void* f, void* y, int64_t n) {
  switch (dtype) {
    case Dtype::kFloat16:
      return add_float16<kRelu>(static_cast<const uint16_t*>(x), static_cast<const uint16_t*>(f),
                                static_cast<uint16_t*>(y), n);
    case Dtype::kBFloat16:
      return add_bfloat16<kRelu>(static_cast<const uint16_t*>(x), static_cast<const uint16_t*>(f),
                                 static_cast<uint16_t*>(y), n);
    case Dtype::kFloat32:
      return add<kRelu>(static_cast<const float*>(x), static_cast<const float*>(f), static_cast<float*>(y), n);
    default:  // float64
      return add<kRelu>(static_cast<const double*>(x), static_cast<const double*>(f), static_cast<double*>(y), n);
  }
}

static void join_dense(Dtype dtype, const void* x, const void* f, void* y, int64_t n, bool relu) {
  return relu ? add<true>(dtype, x, f, y, n) : add<false>(dtype, x, f, y, n);
}

template <typename T>
static void mask(const T* grad_y, const T* y, T* __restrict grad_x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) grad_x[i] = y[i] <= 0 ? T{0} : grad_y[i];
}

static void mask_bfloat16(const uint16_t* grad_y, const uint16_t* y, uint16_t* __restrict grad_x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    grad_x[i] = static_cast<uint16_t>(widen_bfloat16(y[i]) <= 0 ? 0 : grad_y[i]);
  }
}

// Tests the bits of y: positive, or NaN of either sign.
static void mask_float16(const uint16_t* grad_y, const uint16_t* y, uint16_t* __restrict grad_x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint16_t bits = y[i];
    const bool passes = static_cast<uint16_t>(bits - 1) < 0x7fff || bits > 0xfc00;
    grad_x[i] = passes ? grad_y[i] : uint16_t{0};
  }
}

static void mask_dense(Dtype dtype, const void* grad_y, const void* y, void* grad_x, int64_t n) {
  switch (dtype) {
    case Dtype::kFloat16:
      return mask_float16(static_cast<const uint16_t*>(grad_y), static_cast<const uint16_t*>(y),
                          static_cast<uint16_t*>(grad_x), n);
    case Dtype::kBFloat16:
      return mask_bfloat16(static_cast<const uint16_t*>(grad_y), static_cast<const uint16_t*>(y),
                           static_cast<uint16_t*>(grad_x), n);
    case Dtype::kFloat32:
      return mask(static_cast<const float*>(grad_y), static_cast<const float*>(y), static_cast<float*>(grad_x), n);
    default:  // float64
      return mask(static_cast<const double*>(grad_y), static_cast<const double*>(y), static_cast<double*>(grad_x), n);
  }
}

// ---- Float32 with statistics.

GRADPROBE_INLINE void store(float* to, Floats x) { __builtin_memcpy(to, &x, sizeof x); }

// Sources for add_fast (see add_block): x + f and the masked gradient. They also store the values that they return.
template <bool kRelu>
struct Joined {
  const float* x;
  const float* f;
  float* y;

  __attribute__((always_inline)) Floats at(int64_t i) const {
    const Floats sum = load<Floats>(x + i) + load<Floats>(f + i);
    const Floats result = kRelu ? (sum < 0.0f ? Floats{} : sum) : sum;
    store(y + i, result);
    return result;
  }
  __attribute__((always_inline)) Joined operator+(int64_t n) const { return {x + n, f + n, y + n}; }
  __attribute__((always_inline)) bool operator!=(const Joined& other) const { return y != other.y; }
};

struct Masked {
  const float* grad_y;
  const float* y;
  float* grad_x;

  __attribute__((always_inline)) Floats at(int64_t i) const {
    const Floats result = load<Floats>(y + i) <= 0.0f ? Floats{} : load<Floats>(grad_y + i);
    store(grad_x + i, result);
    return result;
  }
  __attribute__((always_inline)) Masked operator+(int64_t n) const { return {grad_y + n, y + n, grad_x + n}; }
  __attribute__((always_inline)) bool operator!=(const Masked& other) const { return grad_x != other.grad_x; }
};

template <bool kRelu>
GRADPROBE_INLINE void load_pair(Joined<kRelu> from, Floats& a, Floats& b) {
  a = from.at(0);
  b = from.at(kFloats);
}

GRADPROBE_INLINE void load_pair(Masked from, Floats& a, Floats& b) {
  a = from.at(0);
  b = from.at(kFloats);
}

template <bool kRelu>
GRADPROBE_INLINE void load_tail(Joined<kRelu> from, int64_t n, float (&tail)[kBlock]) {
  add<kRelu>(from.x, from.f, from.y, n);
  __builtin_memcpy(tail, from.y, n * sizeof(float));
}

GRADPROBE_INLINE void load_tail(Masked from, int64_t n, float (&tail)[kBlock]) {
  mask(from.grad_y, from.y, from.grad_x, n);
  __builtin_memcpy(tail, from.grad_x, n * sizeof(float));
}

// Requires, like masked_stats, that the caller does not flush subnormal numbers.
template <bool kRelu>
static Stats joined_stats(const float* x, const float* f, float* y, int64_t n) {
  Totals totals;
  for (int64_t begin = 0; begin < n; begin += kGroup) {
    const int64_t count = n - begin < kGroup ? n - begin : kGroup;
    const Joined<kRelu> source{x + begin, f + begin, y + begin};
    if (!add_fast<float>(source, count, totals)) add_exact(y + begin, count, totals);
  }
  return finished(totals);
}

#if GRADPROBE_VECTOR_BYTES == 64

// The sums of one of two rows, two registers each, so that both rows fit into the registers.
struct RowSums {
  Floats sum[2] = {};
  Floats sum_abs[2] = {};
  Floats sum_sq[2] = {};

  __attribute__((always_inline)) void flush(Doubles (&totals)[3]) const {
    const Floats sums[3] = {sum[0] + sum[1], sum_abs[0] + sum_abs[1], sum_sq[0] + sum_sq[1]};
    for (int k = 0; k < 3; ++k) totals[k] += low(sums[k]) + high(sums[k]);
  }
};

// Adds a group to both rows in one pass: the incoming gradient, and the outgoing one under the mask of y. `is_added`
// says for each row whether its magnitudes allowed sums in float; if not, nothing is added to it.
GRADPROBE_INLINE void add_both(Masked data, int64_t n, Totals (&totals)[2], bool (&is_added)[2]) {
  constexpr int64_t kPair = 2 * kFloats;
  Doubles sums[2][3] = {};
  Ints abs_max[2][2] = {};
  int64_t nonzero[2] = {};
  const auto add_pair = [&](Masked at, RowSums& incoming, RowSums& outgoing) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int u = 0; u < 2; ++u) {
      const __m512 x = (__m512)load<Floats>(at.grad_y + u * kFloats);
      const __m512 y = (__m512)load<Floats>(at.y + u * kFloats);
      const __mmask16 passes = _mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_NLE_UQ);  // NaN passes
      _mm512_storeu_ps(at.grad_x + u * kFloats, _mm512_maskz_mov_ps(passes, x));
      const __m512i magnitude = _mm512_and_epi32((__m512i)x, _mm512_set1_epi32(0x7fffffff));
      const __mmask16 is_nonzero = _mm512_test_epi32_mask(magnitude, magnitude);
      nonzero[0] += __builtin_popcount(is_nonzero);
      nonzero[1] += __builtin_popcount(is_nonzero & passes);
      incoming.sum[u] += (Floats)x;
      incoming.sum_abs[u] += (Floats)magnitude;
      incoming.sum_sq[u] += (Floats)x * (Floats)x;
      abs_max[0][u] = larger(abs_max[0][u], (Ints)magnitude);
      const auto add_passing = [passes](Floats& sum, __m512 value) __attribute__((always_inline)) {
        sum = (Floats)_mm512_mask_add_ps((__m512)sum, passes, (__m512)sum, value);
      };
      add_passing(outgoing.sum[u], x);
      add_passing(outgoing.sum_abs[u], (__m512)magnitude);
      outgoing.sum_sq[u] = (Floats)_mm512_mask3_fmadd_ps(x, x, (__m512)outgoing.sum_sq[u], passes);
      const __m512i largest = (__m512i)abs_max[1][u];
      abs_max[1][u] = (Ints)_mm512_mask_max_epi32(largest, passes, largest, magnitude);
    }
  };
  int64_t pairs = n / kPair;
  const int64_t n_tail = n % kPair;
  while (true) {
    RowSums incoming, outgoing;
    const int64_t burst = pairs < kFlush ? pairs : kFlush;
    pairs -= burst;
    for (const Masked end = data + burst * kPair; data != end; data = data + kPair) add_pair(data, incoming, outgoing);
    if (pairs == 0 && n_tail != 0) {
      float grad_y[kPair] = {}, y[kPair] = {}, grad_x[kPair];
      __builtin_memcpy(grad_y, data.grad_y, n_tail * sizeof(float));
      __builtin_memcpy(y, data.y, n_tail * sizeof(float));
      add_pair({grad_y, y, grad_x}, incoming, outgoing);
      __builtin_memcpy(data.grad_x, grad_x, n_tail * sizeof(float));
    }
    incoming.flush(sums[0]);
    outgoing.flush(sums[1]);
    if (pairs == 0) break;
  }
  for (int row = 0; row < 2; ++row) {
    const int32_t largest = largest_lane(larger(abs_max[row][0], abs_max[row][1]));
    is_added[row] = fast_is_exact(float_of_bits(largest));
    if (!is_added[row]) continue;
    Totals& total = totals[row];
    total.sum += sums[row][0];
    total.sum_abs += sums[row][1];
    total.sum_sq += sums[row][2];
    total.abs_max_bits = largest > total.abs_max_bits ? largest : total.abs_max_bits;
    total.n_zero += n - nonzero[row];
  }
}

#else

// With fewer registers or no masks, adds one row after the other: the second read hits L1.
GRADPROBE_INLINE void add_both(Masked data, int64_t n, Totals (&totals)[2], bool (&is_added)[2]) {
  is_added[1] = add_fast<float>(data, n, totals[1]);
  is_added[0] = add_fast<float>(data.grad_y, n, totals[0]);
}

#endif

static void masked_stats(const float* grad_y, const float* y, float* grad_x, int64_t n, Stats* of_both) {
  Totals totals[2];
  for (int64_t begin = 0; begin < n; begin += kGroup) {
    const int64_t count = n - begin < kGroup ? n - begin : kGroup;
    bool is_added[2];
    add_both({grad_y + begin, y + begin, grad_x + begin}, count, totals, is_added);
    if (!is_added[0]) add_exact(grad_y + begin, count, totals[0]);
    if (!is_added[1]) add_exact(grad_x + begin, count, totals[1]);
  }
  for (int row = 0; row < 2; ++row) of_both[row] = finished(totals[row]);
}

// ---- Chunks of any dtype.

static void join_chunk(Dtype dtype, const void* x, const void* f, void* y, int64_t n, bool relu, Stats* of_y) {
  if (of_y != nullptr && dtype == Dtype::kFloat32 && !FloatEnvironment::flushes()) {
    const auto stats = relu ? joined_stats<true> : joined_stats<false>;
    *of_y = stats(static_cast<const float*>(x), static_cast<const float*>(f), static_cast<float*>(y), n);
    return;
  }
  join_dense(dtype, x, f, y, n, relu);
  if (of_y == nullptr) return;
  const FloatEnvironment environment;
  *of_y = elements_stats(dtype, y, n);
}

static void mask_chunk(Dtype dtype, const void* grad_y, const void* y, void* grad_x, int64_t n, Stats* of_both) {
  if (of_both != nullptr && y != nullptr && dtype == Dtype::kFloat32 && !FloatEnvironment::flushes()) {
    return masked_stats(static_cast<const float*>(grad_y), static_cast<const float*>(y), static_cast<float*>(grad_x), n,
                        of_both);
  }
  if (y == nullptr) {
    __builtin_memcpy(grad_x, grad_y, n * item_bytes(dtype));
  } else {
    mask_dense(dtype, grad_y, y, grad_x, n);
  }
  if (of_both == nullptr) return;
  const FloatEnvironment environment;
  of_both[0] = elements_stats(dtype, grad_y, n);
  of_both[1] = y == nullptr ? of_both[0] : elements_stats(dtype, grad_x, n);
}

}  // namespace gradprobe::cpu::GRADPROBE_ISA

#undef GRADPROBE_INLINE
