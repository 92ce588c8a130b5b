// The loops of batch normalisation for one instruction set (see each_isa.h). A register holds neighbouring channels of
// a row; sums run down the rows.
#include "cpu/vectors.h"

#define GRADPROBE_INLINE static inline __attribute__((always_inline))

namespace gradprobe::cpu::GRADPROBE_ISA {

// For channels that do not fill a register.
typedef float OneFloat __attribute__((vector_size(4)));

// The registers of bfloat16 elements and of float32 bits that have as many lanes as `Vector`.
template <typename Vector>
struct Lanes {
  typedef uint16_t Halves __attribute__((vector_size(kBytes / 2)));
  typedef uint32_t Words __attribute__((vector_size(kBytes)));
};
template <>
struct Lanes<OneFloat> {
  typedef uint16_t Halves __attribute__((vector_size(2)));
  typedef uint32_t Words __attribute__((vector_size(4)));
};

// Several sums, to hide the latency of an addition.
constexpr int kSums = 4;

template <typename Vector>
GRADPROBE_INLINE Vector load_lanes(const float* from) {
  return load<Vector>(from);
}

template <typename Vector>
GRADPROBE_INLINE Vector load_lanes(const BFloat16* from) {
  using Words = typename Lanes<Vector>::Words;
  return (Vector)(__builtin_convertvector(load<typename Lanes<Vector>::Halves>(from), Words) << 16);
}

template <typename Vector>
GRADPROBE_INLINE void store_lanes(float* to, Vector x) {
  __builtin_memcpy(to, &x, sizeof x);
}

// Rounds like narrow_to_bfloat16.
template <typename Vector>
GRADPROBE_INLINE typename Lanes<Vector>::Halves narrow(Vector x) {
  using Halves = typename Lanes<Vector>::Halves;
  using Words = typename Lanes<Vector>::Words;
  const Words bits = (Words)x;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words is_nan = (Words)(x != x);
  return __builtin_convertvector((is_nan & ((bits >> 16) | 0x40)) | (~is_nan & rounded), Halves);
}

template <typename Vector>
GRADPROBE_INLINE void store_lanes(BFloat16* to, Vector x) {
  const auto halves = narrow(x);
  __builtin_memcpy(to, &halves, sizeof halves);
}

// Returns x as it would be read back from a tensor of the element type.
template <typename Vector>
GRADPROBE_INLINE Vector stored(const float*, Vector x) {
  return x;
}

template <typename Vector>
GRADPROBE_INLINE Vector stored(const BFloat16*, Vector x) {
  BFloat16 elements[sizeof(Vector) / sizeof(float)];
  store_lanes(elements, x);
  return load_lanes<Vector>(elements);
}

// Keeps NaN and -0, like join() and mask() of the residual add.
template <typename Vector>
GRADPROBE_INLINE Vector rectified(Vector x) {
  return x < 0.0f ? Vector{} : x;
}

template <typename Vector>
GRADPROBE_INLINE Vector masked_by(Vector y, Vector grad_y) {
  return y <= 0.0f ? Vector{} : grad_y;
}

template <typename Vector>
GRADPROBE_INLINE Vector total(const Vector (&sums)[kSums]) {
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Calls each(vector, channel) with the type of a register and its first channel. The last register of a row may cover
// channels of the one before: their results are computed twice, and are the same.
template <typename Each>
GRADPROBE_INLINE void for_each_register(int64_t n_channels, const Each& each) {
  int64_t channel = 0;
  for (; channel + kFloats <= n_channels; channel += kFloats) each(Floats{}, channel);
  if (channel == n_channels) return;
  if (n_channels > kFloats) return each(Floats{}, n_channels - kFloats);
  for (; channel < n_channels; ++channel) each(OneFloat{}, channel);
}

// Calls each(row, sum) for every row, with the number of the sum that the row belongs to.
template <typename Each>
GRADPROBE_INLINE void for_each_row(int64_t n_rows, const Each& each) {
  int64_t row = 0;
  for (; row + kSums <= n_rows; row += kSums) {
#pragma GCC unroll 4
    for (int k = 0; k < kSums; ++k) each(row + k, k);
  }
  for (; row < n_rows; ++row) each(row, 0);
}

template <typename T>
static void moments(const T* x, int64_t n_rows, int64_t stride, int64_t n_channels, double* mean, double* sum_sq) {
  for_each_register(n_channels, [&](auto vector, int64_t channel) __attribute__((always_inline)) {
    using Vector = decltype(vector);
    const T* from = x + channel;
    Vector sums[kSums] = {}, rests[kSums] = {}, squares[kSums] = {};
    for_each_row(n_rows, [&](int64_t row, int k)
                             __attribute__((always_inline)) { sums[k] += load_lanes<Vector>(from + row * stride); });
    // Squares of deviations from a rounded mean, corrected by the sum of these deviations.
    const Vector center = total(sums) / static_cast<float>(n_rows);
    for_each_row(n_rows, [&](int64_t row, int k) __attribute__((always_inline)) {
      const Vector deviation = load_lanes<Vector>(from + row * stride) - center;
      rests[k] += deviation;
      squares[k] += deviation * deviation;
    });
    const Vector rest = total(rests), square = total(squares);
    for (size_t lane = 0; lane < sizeof(Vector) / sizeof(float); ++lane) {
      const double shift = static_cast<double>(rest[lane]) / static_cast<double>(n_rows);
      const double corrected = static_cast<double>(square[lane]) - shift * rest[lane];
      mean[channel + lane] = center[lane] + shift;
      sum_sq[channel + lane] = corrected < 0.0 ? 0.0 : corrected;
    }
  });
}

template <bool kAdds, bool kRelu, typename T>
static void normalise(const T* x, const T* shortcut, T* y, int64_t n_rows, int64_t stride, int64_t n_channels,
                      const float* mean, const float* scale, const float* bias) {
  for_each_register(n_channels, [&](auto vector, int64_t channel) __attribute__((always_inline)) {
    using Vector = decltype(vector);
    const Vector center = load<Vector>(mean + channel), slope = load<Vector>(scale + channel),
                 shift = load<Vector>(bias + channel);
    for_each_row(n_rows, [&](int64_t row, int) __attribute__((always_inline)) {
      const int64_t at = row * stride + channel;
      Vector result = (load_lanes<Vector>(x + at) - center) * slope + shift;
      if (kAdds) result = load_lanes<Vector>(shortcut + at) + stored(y, result);
      store_lanes(y + at, kRelu ? rectified(result) : result);
    });
  });
}

template <bool kMasks, bool kKeeps, typename T>
static void gradient_sums(const T* grad_y, const T* y, const T* x, T* masked, int64_t n_rows, int64_t stride,
                          int64_t n_channels, const float* mean, double* sum, double* dot) {
  for_each_register(n_channels, [&](auto vector, int64_t channel) __attribute__((always_inline)) {
    using Vector = decltype(vector);
    const Vector center = load<Vector>(mean + channel);
    Vector sums[kSums] = {}, dots[kSums] = {};
    for_each_row(n_rows, [&](int64_t row, int k) __attribute__((always_inline)) {
      const int64_t at = row * stride + channel;
      Vector g = load_lanes<Vector>(grad_y + at);
      if (kMasks) g = masked_by(load_lanes<Vector>(y + at), g);
      if (kKeeps) store_lanes(masked + at, g);
      sums[k] += g;
      dots[k] += g * (load_lanes<Vector>(x + at) - center);
    });
    const Vector sum_g = total(sums), dot_g = total(dots);
    for (size_t lane = 0; lane < sizeof(Vector) / sizeof(float); ++lane) {
      sum[channel + lane] = sum_g[lane];
      dot[channel + lane] = dot_g[lane];
    }
  });
}

template <bool kMasks, typename T>
static void gradient(const T* grad_y, const T* y, const T* x, T* grad_x, int64_t n_rows, int64_t stride,
                     int64_t n_channels, const float* mean, const float* scale, const float* mean_g,
                     const float* slope) {
  for_each_register(n_channels, [&](auto vector, int64_t channel) __attribute__((always_inline)) {
    using Vector = decltype(vector);
    const Vector center = load<Vector>(mean + channel), factor = load<Vector>(scale + channel),
                 of_g = load<Vector>(mean_g + channel), of_x = load<Vector>(slope + channel);
    for_each_row(n_rows, [&](int64_t row, int) __attribute__((always_inline)) {
      const int64_t at = row * stride + channel;
      Vector g = load_lanes<Vector>(grad_y + at);
      if (kMasks) g = masked_by(load_lanes<Vector>(y + at), g);
      store_lanes(grad_x + at, factor * ((g - of_g) - (load_lanes<Vector>(x + at) - center) * of_x));
    });
  });
}

// ---- Tiles of either element type.

// Calls use(T{}) with the element type.
template <typename Use>
GRADPROBE_INLINE void with_elements(Dtype dtype, const Use& use) {
  if (dtype == Dtype::kBFloat16) return use(BFloat16{});
  use(float{});
}

template <typename T>
GRADPROBE_INLINE const T* tile_of(const void* data, const Matrix& matrix, const Tile& tile, T /*element*/) {
  return data == nullptr ? nullptr : static_cast<const T*>(data) + tile.row * matrix.n_channels + tile.channel;
}

template <typename T>
GRADPROBE_INLINE T* tile_of(void* data, const Matrix& matrix, const Tile& tile, T /*element*/) {
  return data == nullptr ? nullptr : static_cast<T*>(data) + tile.row * matrix.n_channels + tile.channel;
}

static void moments_of_tile(const Matrix& matrix, const void* x, const Tile& tile, double* mean, double* sum_sq) {
  with_elements(matrix.dtype, [&](auto element) {
    moments(tile_of(x, matrix, tile, element), tile.n_rows, matrix.n_channels, tile.n_channels, mean, sum_sq);
  });
}

static void normalise_of_tile(const Matrix& matrix, const void* x, const void* shortcut, void* y, const Tile& tile,
                              const float* mean, const float* scale, const float* bias, bool relu) {
  with_elements(matrix.dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = shortcut == nullptr ? (relu ? normalise<false, true, T> : normalise<false, false, T>)
                                         : (relu ? normalise<true, true, T> : normalise<true, false, T>);
    run(tile_of(x, matrix, tile, element), tile_of(shortcut, matrix, tile, element), tile_of(y, matrix, tile, element),
        tile.n_rows, matrix.n_channels, tile.n_channels, mean + tile.channel, scale + tile.channel,
        bias + tile.channel);
  });
}

static void gradient_sums_of_tile(const Matrix& matrix, const void* grad_y, const void* y, const void* x, void* masked,
                                  const Tile& tile, const float* mean, double* sum, double* dot) {
  with_elements(matrix.dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = y == nullptr        ? gradient_sums<false, false, T>
                     : masked == nullptr ? gradient_sums<true, false, T>
                                         : gradient_sums<true, true, T>;
    run(tile_of(grad_y, matrix, tile, element), tile_of(y, matrix, tile, element), tile_of(x, matrix, tile, element),
        tile_of(masked, matrix, tile, element), tile.n_rows, matrix.n_channels, tile.n_channels, mean + tile.channel,
        sum, dot);
  });
}

static void gradient_of_tile(const Matrix& matrix, const void* grad_y, const void* y, const void* x, void* grad_x,
                             const Tile& tile, const float* mean, const float* scale, const float* mean_g,
                             const float* slope) {
  with_elements(matrix.dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = y == nullptr ? gradient<false, T> : gradient<true, T>;
    run(tile_of(grad_y, matrix, tile, element), tile_of(y, matrix, tile, element), tile_of(x, matrix, tile, element),
        tile_of(grad_x, matrix, tile, element), tile.n_rows, matrix.n_channels, tile.n_channels, mean + tile.channel,
        scale + tile.channel, mean_g + tile.channel, slope + tile.channel);
  });
}

}  // namespace gradprobe::cpu::GRADPROBE_ISA

#undef GRADPROBE_INLINE
