// Checks the CPU kernels of every instruction set of this processor against long double, without torch. Every buffer is
// a heap block of the exact size, so that sanitizers see each wrong access. Prints a line per failure and exits with 1.
//
//   check                     runs all checks
//   check beyond              reads an element too many, which the address sanitizer must report
//   check range-exponent X..  prints range_exponent of each number
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "core/layout.h"
#include "core/stats.h"
#include "cpu/batch_norm.h"
#include "cpu/float_env.h"
#include "cpu/kernels.h"
#include "cpu/residual_add.h"
#include "winograd.h"

using namespace gradprobe;
using namespace gradprobe::cpu;

namespace {

constexpr const char* kIsaNames[kIsas] = {"baseline", "avx2", "avx512"};
constexpr Dtype kDtypes[6] = {Dtype::kFloat16, Dtype::kBFloat16,   Dtype::kFloat32,
                              Dtype::kFloat64, Dtype::kFloat8E4M3, Dtype::kFloat8E5M2};
constexpr const char* kDtypeNames[6] = {"float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"};
int failures = 0;

int fraction_bits(Dtype dtype) {
  constexpr int kBits[6] = {10, 7, 23, 52, 3, 2};
  return kBits[static_cast<int>(dtype)];
}

int exponent_fields(Dtype dtype) { return 1 << (8 * item_bytes(dtype) - 1 - fraction_bits(dtype)); }

double widen_float8(Dtype dtype, uint8_t bits) {
  const int digits = fraction_bits(dtype), magnitude = bits & 127;
  const int exponent = magnitude >> digits, fraction = magnitude % (1 << digits);
  const int bias = exponent_fields(dtype) / 2 - 1;
  double x = std::ldexp(exponent == 0 ? fraction : fraction + (1 << digits), std::max(exponent, 1) - bias - digits);
  if (dtype == Dtype::kFloat8E5M2 && exponent == 31) x = std::numeric_limits<double>::infinity();
  if (magnitude > (dtype == Dtype::kFloat8E5M2 ? 124 : 126)) x = std::numeric_limits<double>::quiet_NaN();
  return bits & 128 ? -x : x;
}

double widen(Dtype dtype, const void* element) {
  if (is_float8(dtype)) return widen_float8(dtype, *static_cast<const uint8_t*>(element));
  if (dtype == Dtype::kFloat64 || dtype == Dtype::kFloat32) {
    double x;
    float f;
    std::memcpy(dtype == Dtype::kFloat64 ? static_cast<void*>(&x) : &f, element, item_bytes(dtype));
    return dtype == Dtype::kFloat64 ? x : f;
  }
  uint16_t bits;
  std::memcpy(&bits, element, 2);
  if (dtype == Dtype::kBFloat16) {
    const uint32_t wide = uint32_t{bits} << 16;
    float f;
    std::memcpy(&f, &wide, 4);
    return f;
  }
  const int exponent = (bits >> 10) & 31;
  const int fraction = bits & 1023;
  double x = exponent == 31
                 ? (fraction ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity())
             : exponent == 0 ? std::ldexp(fraction, -24)
                             : std::ldexp(1024 + fraction, exponent - 25);
  return bits & 0x8000 ? -x : x;
}

// Fills data with random bits: all magnitudes, signs and special values of the dtype. With `exponents` > 0, only that
// many exponents from `first_exponent` on, and some powers of two and zeros.
void fill(Dtype dtype, void* data, int64_t n, std::mt19937_64& random, int first_exponent, int exponents) {
  const int64_t width = item_bytes(dtype);
  for (int64_t i = 0; i < n; ++i) {
    uint64_t bits = random();
    if (exponents > 0) {
      const uint64_t sign = (bits & 1) << (8 * width - 1);
      const uint64_t exponent = first_exponent + (bits >> 1) % exponents;
      const uint64_t fraction = (random() >> 11) & ((uint64_t{1} << fraction_bits(dtype)) - 1);
      bits = sign | exponent << fraction_bits(dtype) | (random() % 16 == 0 ? 0 : fraction);
      if (random() % 16 == 0) bits = sign;
    }
    std::memcpy(static_cast<char*>(data) + i * width, &bits, width);
  }
}

bool close(double actual, long double expected, long double tolerance) {
  if (std::isnan(expected)) return std::isnan(actual);
  if (std::isinf(expected)) return actual == static_cast<double>(expected);
  return std::fabs(static_cast<long double>(actual) - expected) <= tolerance;
}

void check(const char* what, Dtype dtype, Isa isa, const std::vector<double>& x, const Stats& stats) {
  long double sum = 0, sum_abs = 0, sum_sq = 0;
  double abs_max = 0;
  int64_t n_zero = 0, n_nonfinite = 0;
  for (double value : x) abs_max = std::isnan(value) || std::fabs(value) > abs_max ? std::fabs(value) : abs_max;
  for (double value : x) abs_max = std::isnan(value) ? value : abs_max;
  const int exponent = range_exponent(abs_max);
  for (double value : x) {
    n_zero += value == 0;
    n_nonfinite += !std::isfinite(value);
    if (!std::isfinite(abs_max) && std::isfinite(value)) continue;
    const long double scaled = ldexpl(value, -exponent);
    sum += scaled;
    sum_abs += fabsl(scaled);
    sum_sq += scaled * scaled;
  }
  const bool right = close(stats.sum, sum, 1e-6L * sum_abs) && close(stats.sum_abs, sum_abs, 1e-6L * sum_abs) &&
                     close(stats.sum_sq, sum_sq, 2e-6L * sum_sq) && close(stats.abs_max, abs_max, 0) &&
                     stats.n_zero == n_zero && stats.n_nonfinite == n_nonfinite;
  if (right) return;
  ++failures;
  std::printf(
      "%s %s %s n=%zu: sum %.9g (%.9Lg) abs %.9g (%.9Lg) sq %.9g (%.9Lg) max %.9g (%.9g) zero %lld (%lld) nonfinite "
      "%lld (%lld)\n",
      what, kDtypeNames[static_cast<int>(dtype)], kIsaNames[static_cast<int>(isa)], x.size(), stats.sum, sum,
      stats.sum_abs, sum_abs, stats.sum_sq, sum_sq, stats.abs_max, abs_max, static_cast<long long>(stats.n_zero),
      static_cast<long long>(n_zero), static_cast<long long>(stats.n_nonfinite), static_cast<long long>(n_nonfinite));
}

struct Exponents {
  int first, count;
};

void check_dense(Dtype dtype, Isa isa, std::mt19937_64& random) {
  const int64_t width = item_bytes(dtype);
  const int top = exponent_fields(dtype) - 1;
  // All bit patterns; the lowest, middle and highest exponents; all finite values.
  const Exponents kinds[] = {{0, 0}, {0, 2}, {top / 2, 3}, {top - 2, 2}, {0, top}};
  std::vector<int64_t> sizes;
  for (int64_t n = 1; n < 140; ++n) sizes.push_back(n);
  for (int64_t n : {768, 832, 1536, 2048, 4096, 8192}) {
    for (int64_t d = -1; d <= 1; ++d) sizes.push_back(n + d);
  }
  sizes.push_back(kChunkNumel);
  for (int64_t n : sizes) {
    for (const Exponents& kind : kinds) {
      std::unique_ptr<char[]> data(new char[n * width]);
      fill(dtype, data.get(), n, random, kind.first, kind.count);
      std::vector<double> x(n);
      for (int64_t i = 0; i < n; ++i) x[i] = widen(dtype, data.get() + i * width);
      check("dense", dtype, isa, x, chunk_stats({data.get(), dtype, n, nullptr}, 0, n, isa));
    }
  }
}

void check_strided(Dtype dtype, Isa isa, std::mt19937_64& random) {
  const int64_t width = item_bytes(dtype);
  for (int round = 0; round < 150; ++round) {
    int64_t sizes[5], strides[5], numel = 1, reach = 1;
    const int n_dims = 1 + random() % 5;
    for (int d = 0; d < n_dims; ++d) {
      sizes[d] = 1 + random() % 9;
      strides[d] = random() % 40;
      numel *= sizes[d];
      reach += (sizes[d] - 1) * strides[d];
    }
    std::unique_ptr<char[]> data(new char[reach * width]);
    fill(dtype, data.get(), reach, random, 1, 3);
    std::vector<double> x;
    for (int64_t i = 0; i < numel; ++i) {
      int64_t rest = i, offset = 0;
      for (int d = n_dims - 1; d >= 0; --d) {
        offset += rest % sizes[d] * strides[d];
        rest /= sizes[d];
      }
      x.push_back(widen(dtype, data.get() + offset * width));
    }
    const Dims dims = reduce_dims(sizes, strides, n_dims);
    const View view{data.get(), dtype, numel, dims.dense() ? nullptr : &dims};
    const int64_t middle = random() % (numel + 1);
    check("strided", dtype, isa, x, merge(chunk_stats(view, 0, middle, isa), chunk_stats(view, middle, numel, isa)));
    // Scaling by 1 must write every element back to its place, and no other element.
    if (!dims.may_overlap() && !is_float8(dtype)) {
      const std::vector<char> before(data.get(), data.get() + reach * width);
      scale_chunk(view, 0, numel, 1.0, isa);
      if (std::memcmp(before.data(), data.get(), before.size()) != 0) {
        ++failures;
        std::printf("scale by 1 changed a %s tensor (%s)\n", kDtypeNames[static_cast<int>(dtype)],
                    kIsaNames[static_cast<int>(isa)]);
      }
    }
  }
}

void check_magnitudes(Dtype dtype, std::mt19937_64& random) {
  const int64_t width = item_bytes(dtype);
  const int top = exponent_fields(dtype) - 1;
  // All bit patterns; the lowest, middle and highest exponents; all finite values.
  for (const Exponents& kind : {Exponents{0, 0}, {0, 2}, {top / 2, 3}, {top - 1, 1}, {0, top}}) {
    for (int64_t n : {1, 2, 3, 7, 8, 9, 4095, 4097, 10000}) {
      for (int64_t stride : {1, 3}) {
        std::unique_ptr<char[]> data(new char[(1 + (n - 1) * stride) * width]);
        fill(dtype, data.get(), 1 + (n - 1) * stride, random, kind.first, kind.count);
        const Dims dims = reduce_dims(&n, &stride, 1);
        int64_t counts[kCounts] = {}, expected[kCounts] = {};
        const View view{data.get(), dtype, n, dims.dense() ? nullptr : &dims};
        const Moments moments = count_magnitudes(view, 0, n, counts);
        long double largest = 0, sum_square = 0, sum_fourth = 0;
        for (int64_t i = 0; i < n; ++i) {
          const double x = std::fabs(widen(dtype, data.get() + i * stride * width));
          int power = kLowestPower;
          while (power <= kHighestPower && x > std::ldexp(1.0, power)) ++power;
          ++expected[x == 0 ? 0 : std::isfinite(x) ? 1 + power - kLowestPower : kCounts - 1];
          if (std::isfinite(x)) largest = std::max(largest, static_cast<long double>(x));
          const long double scaled = ldexpl(x, -moments.exponent);
          sum_square += scaled * scaled;
          sum_fourth += scaled * scaled * scaled * scaled;
        }
        const bool right = std::memcmp(counts, expected, sizeof counts) == 0 && moments.largest == largest &&
                           close(moments.sum_square, sum_square, 1e-12L * sum_square) &&
                           close(moments.sum_fourth, sum_fourth, 1e-12L * sum_fourth);
        if (right) continue;
        ++failures;
        std::printf("magnitudes are wrong: %s, exponents from %d, n=%lld, stride %lld\n",
                    kDtypeNames[static_cast<int>(dtype)], kind.first, static_cast<long long>(n),
                    static_cast<long long>(stride));
      }
    }
  }
}

// Multiplies every float16 or bfloat16 value by several coefficients, some of which hit rounding boundaries. All
// instruction sets must agree.
void check_scale(Dtype dtype, Isa isa) {
  std::vector<uint16_t> values(65536), expected;
  for (double coefficient : {1.0, 0.1, 3.0, 0x1p-20, 0x1.8p-11, 70000.0, -0.0}) {
    for (int i = 0; i < 65536; ++i) values[i] = static_cast<uint16_t>(i);
    expected = values;
    scale_chunk({values.data(), dtype, 65536, nullptr}, 0, 65536, coefficient, isa);
    scale_chunk({expected.data(), dtype, 65536, nullptr}, 0, 65536, coefficient, Isa::kBaseline);
    for (int i = 0; i < 65536; ++i) {
      const double x = widen(dtype, &values[i]), y = widen(dtype, &expected[i]);
      const uint16_t from = static_cast<uint16_t>(i);
      const float product = static_cast<float>(widen(dtype, &from)) * static_cast<float>(coefficient);
      const bool same = std::isnan(product) ? std::isnan(x) && std::isnan(y) : values[i] == expected[i];
      // Half a unit in the last place, normal or subnormal.
      const bool is_half = dtype == Dtype::kFloat16;
      const double bound = std::fabs(product) * (is_half ? 0x1p-11 : 0x1p-8) + (is_half ? 0x1p-25 : 0x1p-134);
      const double largest = is_half ? 65520 : 0x1.ff0p+127;
      const bool near = std::isnan(product) || std::fabs(product) >= largest || std::fabs(x - product) <= bound;
      if (same && near) continue;
      ++failures;
      std::printf("scale %s %s: %04x * %g = %04x, baseline %04x\n", kDtypeNames[static_cast<int>(dtype)],
                  kIsaNames[static_cast<int>(isa)], i, coefficient, values[i], expected[i]);
    }
  }
}

// Rounds to nearest, ties to even, according to the definition of the format.
double rounded(Dtype dtype, double x) {
  if (dtype == Dtype::kFloat64 || x == 0 || !std::isfinite(x)) return x;
  const bool is_half = dtype == Dtype::kFloat16, is_brain = dtype == Dtype::kBFloat16;
  const int digits = is_half ? 11 : is_brain ? 8 : 24;
  const int smallest = is_half ? -24 : is_brain ? -133 : -149;
  const double largest = is_half ? 65504 : is_brain ? 0x1.fep+127 : 0x1.fffffep+127;
  const int unit = std::max(std::ilogb(x) - (digits - 1), smallest);
  const double result = std::ldexp(std::nearbyint(std::ldexp(x, -unit)), unit);
  return std::fabs(result) > largest ? std::copysign(std::numeric_limits<double>::infinity(), x) : result;
}

bool identical(double a, double b) {
  return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}

// A heap block of exactly n elements.
struct Buffer {
  Buffer(Dtype dtype, int64_t n) : dtype(dtype), n(n), data(new char[n * item_bytes(dtype)]) {}
  Buffer(const Buffer& other) : Buffer(other.dtype, other.n) {
    std::memcpy(data.get(), other.data.get(), n * item_bytes(dtype));
  }
  double operator[](int64_t i) const { return widen(dtype, data.get() + i * item_bytes(dtype)); }

  Dtype dtype;
  int64_t n;
  std::unique_ptr<char[]> data;
};

void check_elements(const char* what, Isa isa, const std::vector<double>& expected, const Buffer& actual) {
  for (int64_t i = 0; i < actual.n; ++i) {
    if (identical(actual[i], expected[i])) continue;
    ++failures;
    std::printf("%s %s %s: element %lld of %lld is %.17g, needed %.17g\n", what,
                kDtypeNames[static_cast<int>(actual.dtype)], kIsaNames[static_cast<int>(isa)],
                static_cast<long long>(i), static_cast<long long>(actual.n), actual[i], expected[i]);
    return;
  }
}

void check_join(Isa isa, const Buffer& x, const Buffer& f, bool relu, int64_t middle) {
  const Dtype dtype = x.dtype;
  const int64_t n = x.n;
  std::vector<double> expected(n), doubled(n);
  for (int64_t i = 0; i < n; ++i) {
    expected[i] = rounded(dtype, x[i] + f[i]);
    doubled[i] = rounded(dtype, x[i] + x[i]);
    if (relu && expected[i] < 0) expected[i] = 0;
    if (relu && doubled[i] < 0) doubled[i] = 0;
  }
  const auto join = [&](const Buffer& of_x, const Buffer& of_f, Buffer& y, Stats* first, Stats* second) {
    add_chunk(dtype, of_x.data.get(), of_f.data.get(), y.data.get(), 0, middle, relu, isa, first);
    add_chunk(dtype, of_x.data.get(), of_f.data.get(), y.data.get(), middle, n, relu, isa, second);
  };
  Buffer y(dtype, n), counted(dtype, n), in_x(x), in_f(f), in_both(x);
  Stats first, second;
  join(x, f, y, nullptr, nullptr);
  check_elements("sum", isa, expected, y);
  join(x, f, counted, &first, &second);
  check_elements("sum with statistics", isa, expected, counted);
  check("sum", dtype, isa, expected, merge(first, second));
  join(in_x, f, in_x, nullptr, nullptr);
  check_elements("sum in place of x", isa, expected, in_x);
  join(x, in_f, in_f, nullptr, nullptr);
  check_elements("sum in place of f", isa, expected, in_f);
  join(in_both, in_both, in_both, nullptr, nullptr);
  check_elements("sum in place of both", isa, doubled, in_both);
}

void check_mask(Isa isa, const Buffer& grad_y, const Buffer& y, int64_t middle) {
  const Dtype dtype = y.dtype;
  const int64_t n = y.n;
  std::vector<double> incoming(n), expected(n);
  for (int64_t i = 0; i < n; ++i) {
    incoming[i] = grad_y[i];
    expected[i] = y[i] <= 0 ? 0 : incoming[i];
  }
  for (const bool masks : {true, false}) {
    const char* of_y = masks ? y.data.get() : nullptr;
    const std::vector<double>& outgoing = masks ? expected : incoming;
    Buffer grad_x(dtype, n), counted(dtype, n);
    Stats first[2], second[2];
    mask_chunk(dtype, grad_y.data.get(), of_y, grad_x.data.get(), 0, n, isa, nullptr);
    check_elements("gradient", isa, outgoing, grad_x);
    mask_chunk(dtype, grad_y.data.get(), of_y, counted.data.get(), 0, middle, isa, first);
    mask_chunk(dtype, grad_y.data.get(), of_y, counted.data.get(), middle, n, isa, second);
    check_elements("gradient with statistics", isa, outgoing, counted);
    check("incoming gradient", dtype, isa, incoming, merge(first[0], second[0]));
    check("outgoing gradient", dtype, isa, outgoing, merge(first[1], second[1]));
  }
}

// `middle`: where the work is split, as into chunks.
void check_branch(Isa isa, const Buffer& branch, const Buffer& shortcut, int64_t middle) {
  const Dtype dtype = branch.dtype;
  std::vector<double> of_branch(branch.n);
  long double expected = 0, magnitudes = 0;
  for (int64_t i = 0; i < branch.n; ++i) {
    of_branch[i] = branch[i];
    const long double product = static_cast<long double>(branch[i]) * shortcut[i];
    expected += product;
    magnitudes += fabsl(product);
  }
  double dots[2];
  const char *a = branch.data.get(), *b = shortcut.data.get();
  const Stats first = branch_chunk(dtype, a, b, 0, middle, isa, &dots[0]);
  check("branch", dtype, isa, of_branch, merge(first, branch_chunk(dtype, a, b, middle, branch.n, isa, &dots[1])));
  const bool is_wide = dtype == Dtype::kFloat64;
  // residual_pass.h computes these again
  if (is_wide && std::isfinite(magnitudes) && magnitudes != 0 && (magnitudes > 1e300L || magnitudes < 1e-280L)) return;
  if (close(dots[0] + dots[1], expected, (is_wide ? 1e-13L : 1.8e-6L) * magnitudes)) return;
  ++failures;
  std::printf("products %s %s n=%lld: %.12g, needed %.12Lg of %.12Lg\n", kDtypeNames[static_cast<int>(dtype)],
              kIsaNames[static_cast<int>(isa)], static_cast<long long>(branch.n), dots[0] + dots[1], expected,
              magnitudes);
}

void check_residual(Dtype dtype, Isa isa, std::mt19937_64& random) {
  const int top = exponent_fields(dtype) - 1;
  // All bit patterns; numbers that nearly cancel; the lowest and the highest exponents; non-finite values.
  const Exponents kinds[] = {{0, 0}, {top / 2, 2}, {0, 3}, {top - 3, 3}, {top - 1, 2}};
  for (int64_t n : {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 129, 1000, 4095, 4097, 9001}) {
    for (const Exponents& kind : kinds) {
      Buffer x(dtype, n), f(dtype, n);
      fill(dtype, x.data.get(), n, random, kind.first, kind.count);
      fill(dtype, f.data.get(), n, random, kind.first, kind.count);
      const int64_t middle = random() % (n + 1);
      check_join(isa, x, f, false, middle);
      check_join(isa, x, f, true, middle);
      check_mask(isa, x, f, middle);
      check_branch(isa, x, f, middle);
    }
  }
}

// A batch normalisation of one tile in the middle of a matrix, both ways, and the same in parts.
struct NormCheck {
  NormCheck(Dtype dtype, Isa isa, const Matrix& matrix, const Tile& tile, std::mt19937_64& random)
      : dtype(dtype),
        isa(isa),
        matrix(matrix),
        tile(tile),
        x(drawn(random)),
        shortcut(drawn(random)),
        grad_y(drawn(random)) {
    for (std::vector<float>* values : {&mean, &scale, &bias, &mean_g, &slope}) {
      for (int64_t c = 0; c < matrix.n_channels; ++c) {
        values->push_back(static_cast<float>(static_cast<int>(random() % 2048) - 1024) / 512);
      }
    }
  }

  Buffer drawn(std::mt19937_64& random) const {
    Buffer buffer(dtype, matrix.n_rows * matrix.n_channels);
    fill(dtype, buffer.data.get(), buffer.n, random, 126, 4);  // magnitudes from 1/2 to 8
    return buffer;
  }

  Buffer blank() const {
    Buffer buffer(dtype, matrix.n_rows * matrix.n_channels);
    std::memset(buffer.data.get(), 0x5a, buffer.n * item_bytes(dtype));
    return buffer;
  }

  // Calls each(element of the matrix, channel) for every element of the tile.
  template <typename Each>
  void visit(const Each& each) const {
    for (int64_t row = tile.row; row < tile.row + tile.n_rows; ++row) {
      for (int64_t c = tile.channel; c < tile.channel + tile.n_channels; ++c) each(row * matrix.n_channels + c, c);
    }
  }

  void expect(bool is_right, const char* what) const {
    if (is_right) return;
    ++failures;
    std::printf("batch norm: %s is wrong, %s %s, %lld x %lld\n", what, kDtypeNames[static_cast<int>(dtype)],
                kIsaNames[static_cast<int>(isa)], static_cast<long long>(tile.n_rows),
                static_cast<long long>(tile.n_channels));
  }

  // Whether `of` gives the elements of the tile to within rounding, and nothing else was written.
  template <typename Of>
  void expect_tile(const Buffer& actual, const char* what, const Of& of) const {
    Buffer outside(actual);
    const Buffer untouched = blank();
    bool is_right = true;
    visit([&](int64_t i, int64_t c) {
      const double expected = of(i, c);
      is_right = is_right && std::fabs(actual[i] - expected) <= (dtype == Dtype::kFloat32 ? 1e-5 : 0.2);
      std::memcpy(outside.data.get() + i * item_bytes(dtype), untouched.data.get(), item_bytes(dtype));
    });
    expect(is_right, what);
    expect(std::memcmp(outside.data.get(), untouched.data.get(), actual.n * item_bytes(dtype)) == 0,
           "the surroundings");
  }

  void check_forward() const {
    std::unique_ptr<double[]> means(new double[tile.n_channels]), sums_sq(new double[tile.n_channels]);
    moments_tile(matrix, x.data.get(), tile, isa, means.get(), sums_sq.get());
    std::vector<double> sum(matrix.n_channels), sum_sq(matrix.n_channels);
    visit([&](int64_t i, int64_t c) { sum[c] += x[i] / static_cast<double>(tile.n_rows); });
    visit([&](int64_t i, int64_t c) { sum_sq[c] += (x[i] - sum[c]) * (x[i] - sum[c]); });
    for (int64_t c = 0; c < tile.n_channels; ++c) {
      expect(std::fabs(means[c] - sum[tile.channel + c]) <= 1e-6, "a mean");
      expect(std::fabs(sums_sq[c] - sum_sq[tile.channel + c]) <= 1e-5 * sum_sq[tile.channel + c] + 1e-9, "a variance");
    }
    const auto normalised = [&](int64_t i, int64_t c) { return (x[i] - mean[c]) * scale[c] + bias[c]; };
    const auto run = [&](const Buffer* added, bool relu) {
      Buffer y = blank();
      normalise_tile(matrix, x.data.get(), added ? added->data.get() : nullptr, y.data.get(), tile, mean.data(),
                     scale.data(), bias.data(), relu, isa);
      return y;
    };
    const Buffer plain = run(nullptr, false), fused = run(&shortcut, true);
    expect_tile(plain, "y", normalised);
    expect_tile(run(nullptr, true), "relu(y)", [&](int64_t i, int64_t c) { return std::max(normalised(i, c), 0.0); });
    expect_tile(run(&shortcut, false), "y + x", [&](int64_t i, int64_t c) { return normalised(i, c) + shortcut[i]; });
    expect_tile(fused, "relu(y + x)",
                [&](int64_t i, int64_t c) { return std::max(normalised(i, c) + shortcut[i], 0.0); });
    Buffer in_parts = blank();
    add_chunk(dtype, shortcut.data.get(), plain.data.get(), in_parts.data.get(), 0, x.n, true, isa, nullptr);
    visit([&](int64_t i, int64_t) { expect(in_parts[i] == fused[i], "y in parts"); });
  }

  void check_backward() const {
    for (const bool masks : {false, true}) {
      const char* y = masks ? shortcut.data.get() : nullptr;
      const auto g = [&](int64_t i, int64_t = 0) { return masks && shortcut[i] <= 0 ? 0.0 : grad_y[i]; };
      Buffer masked = blank(), grad_x = blank(), from_masked = blank();
      std::unique_ptr<double[]> sums(new double[tile.n_channels]), dots(new double[tile.n_channels]);
      gradient_sums_tile(matrix, grad_y.data.get(), y, x.data.get(), masks ? masked.data.get() : nullptr, tile,
                         mean.data(), isa, sums.get(), dots.get());
      std::vector<double> sum(matrix.n_channels), dot(matrix.n_channels), magnitude(matrix.n_channels);
      visit([&](int64_t i, int64_t c) {
        sum[c] += g(i);
        dot[c] += g(i) * (x[i] - mean[c]);
        magnitude[c] += std::fabs(g(i)) * (1 + std::fabs(x[i] - mean[c]));
      });
      for (int64_t c = 0; c < tile.n_channels; ++c) {
        const double bound = 1e-5 * magnitude[tile.channel + c];
        expect(std::fabs(sums[c] - sum[tile.channel + c]) <= bound, "a sum of gradients");
        expect(std::fabs(dots[c] - dot[tile.channel + c]) <= bound, "a sum of products");
      }
      const auto run = [&](const char* from, const char* mask, Buffer& to) {
        gradient_tile(matrix, from, mask, x.data.get(), to.data.get(), tile, mean.data(), scale.data(), mean_g.data(),
                      slope.data(), isa);
      };
      run(grad_y.data.get(), y, grad_x);
      expect_tile(grad_x, "the gradient",
                  [&](int64_t i, int64_t c) { return scale[c] * (g(i) - mean_g[c] - (x[i] - mean[c]) * slope[c]); });
      if (!masks) continue;
      expect_tile(masked, "the masked gradient", g);
      run(masked.data.get(), nullptr, from_masked);
      visit([&](int64_t i, int64_t) { expect(from_masked[i] == grad_x[i], "the gradient in parts"); });
    }
  }

  Dtype dtype;
  Isa isa;
  Matrix matrix;
  Tile tile;
  Buffer x, shortcut, grad_y;
  std::vector<float> mean, scale, bias, mean_g, slope;
};

void check_batch_norm(Dtype dtype, Isa isa, std::mt19937_64& random) {
  for (int64_t n_channels : {1, 3, 4, 7, 8, 9, 15, 16, 17, 24, 33, 64}) {
    for (int64_t n_rows : {1, 2, 3, 4, 5, 50}) {
      const int64_t above = random() % 2, below = random() % 2, left = random() % 2, right = random() % 3;
      const Matrix matrix{dtype, above + n_rows + below, left + n_channels + right};
      const NormCheck check(dtype, isa, matrix, {above, n_rows, left, n_channels}, random);
      check.check_forward();
      check.check_backward();
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const FloatEnvironment environment;
  if (argc > 1 && std::strcmp(argv[1], "beyond") == 0) {
    const std::unique_ptr<float[]> data(new float[100]{});
    return chunk_stats({data.get(), Dtype::kFloat32, 101, nullptr}, 0, 101, best_isa()).n_zero == 101 ? 0 : 1;
  }
  if (argc > 1 && std::strcmp(argv[1], "range-exponent") == 0) {
    for (int i = 2; i < argc; ++i) std::printf("%d\n", range_exponent(std::strtod(argv[i], nullptr)));
    return 0;
  }
  std::mt19937_64 of_magnitudes(7);
  for (Dtype dtype : kDtypes) check_magnitudes(dtype, of_magnitudes);
  int sets = 0;
  for (int i = 0; i < kIsas; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!can_run(isa)) continue;
    ++sets;
    std::mt19937_64 random(42);
    for (Dtype dtype : kDtypes) {
      check_dense(dtype, isa, random);
      check_strided(dtype, isa, random);
      if (is_float8(dtype)) continue;  // only measured
      check_residual(dtype, isa, random);
      if (item_bytes(dtype) == 2) check_scale(dtype, isa);
      if (dtype == Dtype::kFloat32 || dtype == Dtype::kBFloat16) check_batch_norm(dtype, isa, random);
    }
    failures += check_winograd(isa, random);
    std::printf("checked %s\n", kIsaNames[i]);
  }
  std::printf("%d instruction sets, %d failures\n", sets, failures);
  return failures == 0 ? 0 : 1;
}
