// The statistics of the elements that one thread reads.
#pragma once

#include "cuda/device.cuh"

namespace gradprobe::cuda {

template <typename T>
__device__ __forceinline__ void widen(const Vector<T>& vector, Wide<T>* x) {
#pragma unroll
  for (int i = 0; i < kVectorNumel<T>; ++i) x[i] = widened(vector.element[i]);
}

// One instruction per element: bfloat16 is the upper half of a float.
__device__ __forceinline__ void widen(const Vector<__nv_bfloat16>& vector, float* x) {
  uint32_t pairs[kVectorBytes / 4];
  memcpy(pairs, &vector, sizeof pairs);
#pragma unroll
  for (int i = 0; i < kVectorBytes / 4; ++i) {
    x[2 * i] = float_of_bits(static_cast<int32_t>(pairs[i] << 16));
    x[2 * i + 1] = float_of_bits(static_cast<int32_t>(pairs[i] & 0xffff0000u));
  }
}

// What one instruction takes the magnitude of: a float, or two 16-bit numbers from compute capability 8.0 on.
template <typename T>
struct LanesOf {
  using Type = float;
};
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
template <>
struct LanesOf<__half> {
  using Type = __half2;
};
template <>
struct LanesOf<__nv_bfloat16> {
  using Type = __nv_bfloat162;
};
#endif
template <typename T>
using Lanes = typename LanesOf<T>::Type;

template <typename T>
inline constexpr int kVectorLanes = kVectorBytes / static_cast<int>(std::is_same_v<Lanes<T>, float> ? sizeof(T) : 4);

template <typename T>
__device__ __forceinline__ void to_lanes(const Vector<T>& vector, Lanes<T>* lanes) {
  if constexpr (std::is_same_v<Lanes<T>, float>) {
    widen(vector, lanes);
  } else {
    memcpy(lanes, &vector, sizeof vector);
  }
}

template <typename T>
__device__ __forceinline__ Lanes<T> to_lanes(T element) {
  if constexpr (std::is_same_v<Lanes<T>, float>) {
    return widened(element);
  } else {
    const T both[2] = {element, element};
    Lanes<T> lanes;
    memcpy(&lanes, both, sizeof lanes);
    return lanes;
  }
}

// Of magnitudes, per lane. A NaN loses against a number.
__device__ __forceinline__ float magnitude(float x) { return fabsf(x); }
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ float smaller(float a, float b) { return fminf(a, b); }
__device__ __forceinline__ bool is_positive(float x) { return x > 0.0f; }
__device__ __forceinline__ float largest(float x) { return x; }

template <typename Pair>
__device__ __forceinline__ Pair magnitude(Pair x) {
  return __habs2(x);
}
template <typename Pair>
__device__ __forceinline__ Pair larger(Pair a, Pair b) {
  return __hmax2(a, b);
}
template <typename Pair>
__device__ __forceinline__ Pair smaller(Pair a, Pair b) {
  return __hmin2(a, b);
}
template <typename Pair>
__device__ __forceinline__ bool is_positive(Pair x) {
  return __hbgt2(x, Pair{});
}
template <typename Pair>
__device__ __forceinline__ float largest(Pair x) {
  return fmaxf(__low2float(x), __high2float(x));
}

// Of elements [begin, end) of x, one after another.
template <int begin, int end, int n>
__device__ __forceinline__ FastSums fast_sums(const float (&x)[n]) {
  static_assert(end - begin <= kFastAdds);
  FastSums sums = gradprobe::fast_sums(x[begin]);
#pragma unroll
  for (int i = begin + 1; i < end; ++i) add(sums, x[i]);
  return sums;
}

template <int n>
__device__ __forceinline__ FastSums fast_sums(const float (&x)[n]) {
  if constexpr (n <= kFastAdds) {
    return fast_sums<0, n>(x);
  } else {
    return merge(fast_sums<0, n / 2>(x), fast_sums<n / 2, n>(x));
  }
}

// For float and narrower types: sums of groups in float, accumulated in double. The exponent of their raw rows is
// always 0. Most groups need neither a count nor a second look: all their elements are in range and not zero.
template <typename T>
struct ThreadSums {
  double sum = 0.0;
  double sum_abs = 0.0;
  double sum_sq = 0.0;
  Lanes<T> abs_max{};  // the largest except NaN
  int32_t n_zero = 0;
  int32_t n_nonfinite = 0;

  template <int n>
  __device__ __forceinline__ void add(const Vector<T> (&vectors)[n]) {
    constexpr int kNumel = kVectorNumel<T>;
    Lanes<T> lanes[n * kVectorLanes<T>];
    float x[n * kNumel];
#pragma unroll
    for (int l = 0; l < n; ++l) {
      to_lanes(vectors[l], lanes + l * kVectorLanes<T>);
      widen(vectors[l], x + l * kNumel);
    }
    Lanes<T> abs_min = magnitude(lanes[0]);
#pragma unroll
    for (const Lanes<T> lane : lanes) {
      abs_max = larger(abs_max, magnitude(lane));
      abs_min = smaller(abs_min, magnitude(lane));
    }
    const FastSums fast = fast_sums(x);
    if (is_positive(abs_min) && fast_is_exact(fast.sum_abs)) {
      add_fast(fast, 1.0);
    } else {
      // Converting again keeps `x` from occupying registers until here.
#pragma unroll
      for (int i = 0; i < n * kNumel; ++i) x[i] = widened(vectors[i / kNumel].element[i % kNumel]);
      add_rare(x, fast);
    }
  }

  __device__ __forceinline__ void add(T element) {
    const float x = widened(element);
    const double wide = x;
    sum += wide;
    sum_abs += fabs(wide);
    sum_sq += wide * wide;
    abs_max = larger(abs_max, magnitude(to_lanes(element)));
    n_zero += x == 0.0f;
    n_nonfinite += !is_finite(x);
  }

  __device__ __forceinline__ Stats stats() const {
    // sum_abs is NaN if any element is.
    return {sum, sum_abs, sum_sq, sum_abs != sum_abs ? sum_abs : largest(abs_max), n_zero, n_nonfinite};
  }

 private:
  // Adds a group with zeros, NaN or infinities, or out of the range of fast sums.
  template <int n>
  __device__ __forceinline__ void add_rare(float (&x)[n], const FastSums& fast) {
#pragma unroll
    for (int i = 0; i < n; ++i) n_zero += x[i] == 0.0f;
    if (fast_is_exact(fast.sum_abs)) return add_fast(fast, 1.0);
    const bool is_small = fast.sum_abs < kFastMin;
    const float factor = is_small ? kRescale : 1 / kRescale;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      n_nonfinite += !is_finite(x[i]);
      x[i] *= factor;
    }
    add_fast(fast_sums(x), is_small ? 1.0 / kRescale : double{kRescale});
  }

  // Adds sums in multiples of `unit`, a power of two.
  __device__ __forceinline__ void add_fast(const FastSums& fast, double unit) {
    sum += fast.sum * unit;
    sum_abs += fast.sum_abs * unit;
    sum_sq += fast.sum_sq * (unit * unit);
  }
};

template <>
struct ThreadSums<double> {
  Stats total = identity();

  template <int n>
  __device__ __forceinline__ void add(const Vector<double> (&vectors)[n]) {
    constexpr int kNumel = kVectorNumel<double>;
    double x[n * kNumel];
#pragma unroll
    for (int i = 0; i < n * kNumel; ++i) x[i] = vectors[i / kNumel].element[i % kNumel];
    add_group(x);
  }

  __device__ __forceinline__ void add(double element) {
    const double x[1] = {element};
    add_group(x);
  }

  __device__ __forceinline__ Stats stats() const { return total; }

 private:
  template <int n>
  __device__ __forceinline__ void add_group(const double (&x)[n]) {
    int64_t abs_max_bits = 0;
#pragma unroll
    for (int i = 0; i < n; ++i) abs_max_bits = abs_bits(x[i]) > abs_max_bits ? abs_bits(x[i]) : abs_max_bits;
    Stats group = identity();
    const double factor = range_factor(double_of_bits(abs_max_bits));
#pragma unroll
    for (int i = 0; i < n; ++i) gradprobe::add(group, x[i], factor);
    total = merge(total, group);
  }
};

}  // namespace gradprobe::cuda
