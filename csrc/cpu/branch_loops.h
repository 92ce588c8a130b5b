// The loops over the two parts of the gradient at x for one instruction set: the statistics of the branch's part, and
// the sum of its products with the shortcut's part.
#include "cpu/grad_stats_loops.h"

#define GRADPROBE_INLINE static inline __attribute__((always_inline))

namespace gradprobe::cpu::GRADPROBE_ISA {

// Adds the products of two registers; those of floats in double, where they are exact.
GRADPROBE_INLINE void add_products(Doubles a, Doubles b, Doubles (&sums)[2]) { sums[0] += a * b; }
GRADPROBE_INLINE void add_products(Floats a, Floats b, Doubles (&sums)[2]) {
  sums[0] += low(a) * low(b);
  sums[1] += high(a) * high(b);
}

GRADPROBE_INLINE void load_pair(const double* from, Doubles& a, Doubles& b) {
  a = load<Doubles>(from);
  b = load<Doubles>(from + kDoubles);
}

// Returns the sum of a * b.
template <typename Register, typename T>
static double dot(const T* a, const T* b, int64_t n) {
  constexpr int64_t kPair = 2 * sizeof(Register) / sizeof(Register{}[0]);
  Doubles sums[2][2] = {};  // several sums, to hide the latency of an addition
  const auto add_pair = [&](const T* of_a, const T* of_b) __attribute__((always_inline)) {
    Register x[2], y[2];
    load_pair(of_a, x[0], x[1]);
    load_pair(of_b, y[0], y[1]);
#pragma GCC unroll 2
    for (int u = 0; u < 2; ++u) add_products(x[u], y[u], sums[u]);
  };
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) add_pair(a + i, b + i);
  if (i < n) {
    T tails[2][kPair] = {};
    __builtin_memcpy(tails[0], a + i, (n - i) * sizeof(T));
    __builtin_memcpy(tails[1], b + i, (n - i) * sizeof(T));
    add_pair(tails[0], tails[1]);
  }
  return sum_of_lanes((sums[0][0] + sums[0][1]) + (sums[1][0] + sums[1][1]));
}

// Float sums of products, and the double total that they are flushed to. Each lane adds kUnroll / 2 products per block,
// hence at most 2 * (kFlush + 1) roundings including those of the products: an error of at most 1.8e-6 of the sum of
// magnitudes. With the errors of the norms, a cosine errs by at most 2.9e-6.
struct FastProducts {
  Floats lanes[2] = {};
  Doubles total{};
};

// A source (see add_block) that loads the branch's part and adds up its products with the shortcut's part.
template <typename T>
struct BesideShortcut {
  const T* branch;
  const T* shortcut;
  FastProducts* products;

  __attribute__((always_inline)) BesideShortcut operator+(int64_t n) const {
    return {branch + n, shortcut + n, products};
  }
  __attribute__((always_inline)) bool operator!=(const BesideShortcut& other) const { return branch != other.branch; }
};

template <typename T>
GRADPROBE_INLINE void prefetch(const BesideShortcut<T>& source) {
  prefetch(source.branch);
  prefetch(source.shortcut);
}

template <typename T>
GRADPROBE_INLINE void load_pair(BesideShortcut<T> from, Floats& a, Floats& b) {
  Floats beside[2];
  load_pair(from.branch, a, b);
  load_pair(from.shortcut, beside[0], beside[1]);
  from.products->lanes[0] += a * beside[0];
  from.products->lanes[1] += b * beside[1];
}

template <typename T>
GRADPROBE_INLINE void load_tail(BesideShortcut<T> from, int64_t n, T (&tail)[kBlock]) {
  T beside[kBlock] = {};
  load_tail(from.branch, n, tail);
  load_tail(from.shortcut, n, beside);
  const BesideShortcut<T> padded{tail, beside, from.products};
  Floats unused[2];
  for (int u = 0; u < kUnroll; u += 2) load_pair(padded + u * kFloats, unused[0], unused[1]);
}

template <typename T>
GRADPROBE_INLINE void flush_own(const BesideShortcut<T>& source) {
  for (Floats& lane : source.products->lanes) {
    source.products->total += low(lane) + high(lane);
    lane = Floats{};
  }
}

// Whether the products of a group fit into float. Overflow leaves a non-finite sum; each subnormal product loses at
// most 2**-150 if subnormals are not flushed, those of a whole group 2**-137. Products that cancel or are all zero are
// computed again needlessly.
GRADPROBE_INLINE bool fit_into_float(double sum_of_products) {
  return is_finite(sum_of_products) && (sum_of_products >= 0x1p-100 || sum_of_products <= -0x1p-100);
}

template <typename T>
static Stats branch_stats(const T* branch, const T* shortcut, int64_t n, double* sum_of_products) {
  Totals totals;
  *sum_of_products = 0.0;
  for (int64_t begin = 0; begin < n; begin += kGroup) {
    const int64_t count = n - begin < kGroup ? n - begin : kGroup;
    FastProducts products;
    const BesideShortcut<T> source{branch + begin, shortcut + begin, &products};
    if (!add_fast<T>(source, count, totals)) add_exact(branch + begin, count, totals);
    const double fast = sum_of_lanes(products.total);
    *sum_of_products += fit_into_float(fast) ? fast : dot<Floats>(branch + begin, shortcut + begin, count);
  }
  return finished(totals);
}

static Stats branch_stats(const double* branch, const double* shortcut, int64_t n, double* sum_of_products) {
  Stats stats = identity();
  *sum_of_products = 0.0;
  for (int64_t begin = 0; begin < n; begin += kDoubleGroup) {
    const int64_t count = n - begin < kDoubleGroup ? n - begin : kDoubleGroup;
    *sum_of_products += dot<Doubles>(branch + begin, shortcut + begin, count);
    stats = merge(stats, stats_of(branch + begin, count));
  }
  return stats;
}

static Stats branch_chunk(Dtype dtype, const void* branch, const void* shortcut, int64_t n, double* sum_of_products) {
  const auto stats = [&](auto type) {
    using T = decltype(type);
    return branch_stats(static_cast<const T*>(branch), static_cast<const T*>(shortcut), n, sum_of_products);
  };
  switch (dtype) {
    case Dtype::kFloat16:
      return stats(Float16{});
    case Dtype::kBFloat16:
      return stats(BFloat16{});
    case Dtype::kFloat32:
      return stats(float{});
    default:  // float64
      return stats(double{});
  }
}

}  // namespace gradprobe::cpu::GRADPROBE_ISA

#undef GRADPROBE_INLINE
