// The loops of Winograd's convolution for one instruction set (see each_isa.h). A register holds neighbouring channels
// of a pixel.
#include "cpu/vectors.h"

#define GRADPROBE_INLINE static inline __attribute__((always_inline))

namespace gradprobe::cpu::GRADPROBE_ISA {

// What stands for the pixels around an image.
alignas(kBytes) static const float kZeros[kMostChannels] = {};

GRADPROBE_INLINE void store(float* to, Floats values) { __builtin_memcpy(to, &values, sizeof values); }

// A tile's image, and the row and column of its first pixel.
struct Place {
  int64_t image, row, column;
};

// Calls each(tile, place) for the tiles of a block, counted from its first.
template <typename Each>
GRADPROBE_INLINE void for_each_tile(const Images& images, const Block& block, const Each& each) {
  const int64_t rows = images.tile_rows(), columns = images.tile_columns();
  Place place{block.first / columns / rows, block.first / columns % rows * 2, block.first % columns * 2};
  for (int64_t tile = 0; tile < block.n_tiles; ++tile) {
    each(tile, place);
    place.column += 2;
    if (place.column < images.width) continue;
    place.column = 0;
    place.row += 2;
    if (place.row < images.height) continue;
    place.row = 0;
    ++place.image;
  }
}

// Finds the pixels [kSize, kSize] of an image from `row` and `column` on; `outside` stands for those outside.
template <int kSize, typename Float>
GRADPROBE_INLINE void find_pixels(const Images& images, Float* data, int64_t n_channels, int64_t image, int64_t row,
                                  int64_t column, Float* outside, Float* (&pixels)[kSize * kSize]) {
#pragma GCC unroll 4
  for (int i = 0; i < kSize; ++i) {
    const bool is_row = row + i >= 0 && row + i < images.height;
    Float* const first = data + ((image * images.height + row + i) * images.width + column) * n_channels;
#pragma GCC unroll 4
    for (int j = 0; j < kSize; ++j) {
      const bool is_inside = is_row && column + j >= 0 && column + j < images.width;
      pixels[i * kSize + j] = is_inside ? first + j * n_channels : outside;
    }
  }
}

// ---- The transforms of one dimension.

// B^T d
GRADPROBE_INLINE void transform_patch(const Floats (&d)[4], Floats (&out)[4]) {
  out[0] = d[0] - d[2];
  out[1] = d[1] + d[2];
  out[2] = d[2] - d[1];
  out[3] = d[1] - d[3];
}

// G g
GRADPROBE_INLINE void transform_filter(const Floats (&g)[3], Floats (&out)[4]) {
  const Floats outer = (g[0] + g[2]) * 0.5f, inner = g[1] * 0.5f;
  out[0] = g[0];
  out[1] = outer + inner;
  out[2] = outer - inner;
  out[3] = g[2];
}

// A^T m
GRADPROBE_INLINE void tile_of_products(const Floats (&m)[4], Floats (&out)[2]) {
  out[0] = m[0] + m[1] + m[2];
  out[1] = m[1] - m[2] - m[3];
}

// A g
GRADPROBE_INLINE void transform_tile(const Floats (&g)[2], Floats (&out)[4]) {
  out[0] = g[0];
  out[1] = g[0] + g[1];
  out[2] = g[0] - g[1];
  out[3] = -g[1];
}

// G^T s
GRADPROBE_INLINE void filter_of_sums(const Floats (&s)[4], Floats (&out)[3]) {
  const Floats sum = (s[1] + s[2]) * 0.5f, difference = (s[1] - s[2]) * 0.5f;
  out[0] = s[0] + sum;
  out[1] = difference;
  out[2] = sum + s[3];
}

// Applies a transform from kFrom to kTo points to the columns and then to the rows of a square.
template <int kFrom, int kTo, void (*kTransform)(const Floats (&)[kFrom], Floats (&)[kTo])>
GRADPROBE_INLINE void transform_square(const Floats (&in)[kFrom * kFrom], Floats (&out)[kTo * kTo]) {
  Floats half[kTo][kFrom];
#pragma GCC unroll 4
  for (int j = 0; j < kFrom; ++j) {
    Floats column[kFrom], transformed[kTo];
#pragma GCC unroll 4
    for (int i = 0; i < kFrom; ++i) column[i] = in[i * kFrom + j];
    kTransform(column, transformed);
#pragma GCC unroll 4
    for (int i = 0; i < kTo; ++i) half[i][j] = transformed[i];
  }
#pragma GCC unroll 4
  for (int i = 0; i < kTo; ++i) {
    Floats transformed[kTo];
    kTransform(half[i], transformed);
#pragma GCC unroll 4
    for (int j = 0; j < kTo; ++j) out[i * kTo + j] = transformed[j];
  }
}

// ---- Filters [out_channels, 3, 3, in_channels].

// Exchanges the lanes of a with bit kBit set and the lanes of b without it.
template <int kBit>
GRADPROBE_INLINE void exchange_lanes(Floats& a, Floats& b) {
  Ints of_a, of_b;  // lane numbers in (a, b)
#pragma GCC unroll 16
  for (int lane = 0; lane < kFloats; ++lane) {
    of_a[lane] = lane & kBit ? kFloats + lane - kBit : lane;
    of_b[lane] = lane & kBit ? kFloats + lane : lane + kBit;
  }
  const Floats first = a, second = b;
#if defined(__clang__)
#pragma GCC unroll 16
  for (int lane = 0; lane < kFloats; ++lane) {
    a[lane] = of_a[lane] < kFloats ? first[of_a[lane]] : second[of_a[lane] - kFloats];
    b[lane] = of_b[lane] < kFloats ? first[of_b[lane]] : second[of_b[lane] - kFloats];
  }
#else
  a = __builtin_shuffle(first, second, of_a);
  b = __builtin_shuffle(first, second, of_b);
#endif
}

template <int kBit>
GRADPROBE_INLINE void transpose_lanes(Floats (&rows)[kFloats]) {
#pragma GCC unroll 16
  for (int row = 0; row < kFloats; ++row) {
    if ((row & kBit) == 0) exchange_lanes<kBit>(rows[row], rows[row + kBit]);
  }
  if constexpr (kBit > 1) transpose_lanes<kBit / 2>(rows);
}

// Writes [9, in_channels, out_channels], so that a register holds neighbouring output channels.
static void transpose_filters(const float* filters, int64_t in_channels, int64_t out_channels, float* transposed) {
  for (int64_t point = 0; point < 9; ++point) {
    for (int64_t c = 0; c < in_channels; c += kFloats) {
      for (int64_t k = 0; k < out_channels; k += kFloats) {
        Floats rows[kFloats];
#pragma GCC unroll 16
        for (int row = 0; row < kFloats; ++row) {
          rows[row] = load<Floats>(filters + ((k + row) * 9 + point) * in_channels + c);
        }
        transpose_lanes<kFloats / 2>(rows);
#pragma GCC unroll 16
        for (int row = 0; row < kFloats; ++row) {
          store(transposed + (point * in_channels + c + row) * out_channels + k, rows[row]);
        }
      }
    }
  }
}

// Writes G g G^T, [kPoints, n_outer, n_inner], of filters whose points are `point_step` apart, and whose elements
// (outer, inner) stand at outer * outer_step + inner.
template <bool kRotated>
static void transform_all_filters(const float* filters, int64_t point_step, int64_t n_outer, int64_t outer_step,
                                  int64_t n_inner, float* transformed) {
  for (int64_t outer = 0; outer < n_outer; ++outer) {
    for (int64_t inner = 0; inner < n_inner; inner += kFloats) {
      const float* from = filters + outer * outer_step + inner;
      Floats g[9], u[kPoints];
#pragma GCC unroll 9
      for (int point = 0; point < 9; ++point)
        g[point] = load<Floats>(from + (kRotated ? 8 - point : point) * point_step);
      transform_square<3, 4, transform_filter>(g, u);
#pragma GCC unroll 16
      for (int point = 0; point < kPoints; ++point) {
        store(transformed + point * filter_stride(n_outer, n_inner) + outer * n_inner + inner, u[point]);
      }
    }
  }
}

static void filters_transformed(const float* filters, int64_t in_channels, int64_t out_channels, float* transposed,
                                float* transformed) {
  transpose_filters(filters, in_channels, out_channels, transposed);
  transform_all_filters<false>(transposed, in_channels * out_channels, in_channels, out_channels, out_channels,
                               transformed);
}

static void rotated_filters_transformed(const float* filters, int64_t in_channels, int64_t out_channels,
                                        float* transformed) {
  transform_all_filters<true>(filters, in_channels, out_channels, 9 * in_channels, in_channels, transformed);
}

static void filter_gradients_written(const float* sums, int64_t in_channels, int64_t out_channels, float* gradients) {
  for (int64_t k = 0; k < out_channels; ++k) {
    for (int64_t c = 0; c < in_channels; c += kFloats) {
      Floats s[kPoints], g[9];
#pragma GCC unroll 16
      for (int point = 0; point < kPoints; ++point) {
        s[point] = load<Floats>(sums + point * filter_stride(in_channels, out_channels) + k * in_channels + c);
      }
      transform_square<4, 3, filter_of_sums>(s, g);
#pragma GCC unroll 9
      for (int point = 0; point < 9; ++point) store(gradients + (k * 9 + point) * in_channels + c, g[point]);
    }
  }
}

// ---- Patches and tiles.

static void patches_transformed(const Images& images, const float* x, int64_t n_channels, const Block& block,
                                float* patches) {
  const int64_t stride = point_stride(n_channels);
  for_each_tile(images, block, [&](int64_t tile, const Place& place) __attribute__((always_inline)) {
    const float* pixels[16];
    find_pixels<4>(images, x, n_channels, place.image, place.row - 1, place.column - 1, kZeros, pixels);
    for (int64_t c = 0; c < n_channels; c += kFloats) {
      Floats d[16], v[kPoints];
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k) d[k] = load<Floats>(pixels[k] + c);
      transform_square<4, 4, transform_patch>(d, v);
#pragma GCC unroll 16
      for (int k = 0; k < kPoints; ++k) store(patches + k * stride + tile * n_channels + c, v[k]);
    }
  });
}

static void tiles_transformed(const Images& images, const float* grad_y, int64_t n_channels, const Block& block,
                              float* tiles) {
  const int64_t stride = point_stride(n_channels);
  for_each_tile(images, block, [&](int64_t tile, const Place& place) __attribute__((always_inline)) {
    const float* pixels[4];
    find_pixels<2>(images, grad_y, n_channels, place.image, place.row, place.column, kZeros, pixels);
    for (int64_t c = 0; c < n_channels; c += kFloats) {
      Floats g[4], z[kPoints];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) g[k] = load<Floats>(pixels[k] + c);
      transform_square<2, 4, transform_tile>(g, z);
#pragma GCC unroll 16
      for (int k = 0; k < kPoints; ++k) store(tiles + k * stride + tile * n_channels + c, z[k]);
    }
  });
}

static void tiles_written(const Images& images, const float* products, const float* bias, int64_t n_channels,
                          const Block& block, float* y) {
  const int64_t stride = point_stride(n_channels);
  alignas(kBytes) float outside[kMostChannels];
  for_each_tile(images, block, [&](int64_t tile, const Place& place) __attribute__((always_inline)) {
    float* pixels[4];
    find_pixels<2>(images, y, n_channels, place.image, place.row, place.column, outside, pixels);
    for (int64_t c = 0; c < n_channels; c += kFloats) {
      const Floats shift = bias == nullptr ? Floats{} : load<Floats>(bias + c);
      Floats m[kPoints], of_tile[4];
#pragma GCC unroll 16
      for (int k = 0; k < kPoints; ++k) m[k] = load<Floats>(products + k * stride + tile * n_channels + c);
      transform_square<4, 2, tile_of_products>(m, of_tile);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) store(pixels[k] + c, of_tile[k] + shift);
    }
  });
}

// ---- Products.

// A left operand: element (row, k) stands at data[row * row_step + k * step].
struct Left {
  const float* data;
  int64_t row_step;
  int64_t step;
};

// Writes out[row, column] = the sum over k of left[row, k] * right[k, column], or adds it, for kRows rows and kVectors
// registers of columns. right [n_terms, n_columns], out [kRows, n_columns].
template <int kRows, int kVectors, bool kAdds>
GRADPROBE_INLINE void multiply_registers(const Left& left, const float* right, int64_t n_terms, int64_t n_columns,
                                         float* out) {
  Floats sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      sums[row][v] = kAdds ? load<Floats>(out + row * n_columns + v * kFloats) : Floats{};
    }
  }
  for (int64_t k = 0; k < n_terms; ++k) {
    Floats factors[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) factors[v] = load<Floats>(right + k * n_columns + v * kFloats);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const float factor = left.data[row * left.row_step + k * left.step];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[row][v] += factor * factors[v];
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(out + row * n_columns + v * kFloats, sums[row][v]);
  }
}

// The same for n_rows rows, rounded up to a multiple of 16, and n_columns columns.
template <bool kAdds>
static void multiply(const Left& left, const float* right, int64_t n_rows, int64_t n_terms, int64_t n_columns,
                     float* out) {
  const auto run = [&]<int kRows, int kVectors>() __attribute__((always_inline)) {
    for (int64_t row = 0; row < n_rows; row += kRows) {
      const Left rows{left.data + row * left.row_step, left.row_step, left.step};
      for (int64_t column = 0; column < n_columns; column += kVectors * kFloats) {
        multiply_registers<kRows, kVectors, kAdds>(rows, right + column, n_terms, n_columns,
                                                   out + row * n_columns + column);
      }
    }
  };
  if constexpr (kFloats < 16) {
    run.template operator()<4, 2>();
  } else if (n_columns % (2 * kFloats) == 0) {
    run.template operator()<8, 2>();
  } else {
    run.template operator()<16, 1>();
  }
}

static void filters_multiplied(const float* patches, const float* transformed, int64_t in_channels,
                               int64_t out_channels, int64_t n_tiles, float* products) {
  for (int point = 0; point < kPoints; ++point) {
    multiply<false>({patches + point * point_stride(in_channels), in_channels, 1},
                    transformed + point * filter_stride(in_channels, out_channels), n_tiles, in_channels, out_channels,
                    products + point * point_stride(out_channels));
  }
}

static void filter_products_added(const float* tiles, const float* patches, int64_t in_channels, int64_t out_channels,
                                  int64_t n_tiles, float* sums) {
  for (int point = 0; point < kPoints; ++point) {
    multiply<true>({tiles + point * point_stride(out_channels), 1, out_channels},
                   patches + point * point_stride(in_channels), out_channels, n_tiles, in_channels,
                   sums + point * filter_stride(in_channels, out_channels));
  }
}

}  // namespace gradprobe::cpu::GRADPROBE_ISA

#undef GRADPROBE_INLINE
