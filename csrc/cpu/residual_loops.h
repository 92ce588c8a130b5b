// The loops of residual_add for one instruction set, left to the compiler to vectorise. residual_add.cpp includes this
// file once per set, each time with
//   GRADPROBE_LOOPS     the namespace
//   GRADPROBE_HAS_F16C  1 where the processor converts float16 by itself
// and with the compiler's target set to match. No include guard, and no headers of its own, for that reason.

namespace gradprobe::cpu::GRADPROBE_LOOPS {

// As torch.relu on the CPU: NaN and -0 stay what they are.
template <bool kRelu, typename T>
static inline T join(T x, T f) {
  const T sum = x + f;
  return kRelu && sum < 0 ? T{0} : sum;
}

template <bool kRelu, typename T>
static void add(const T* x, const T* f, T* __restrict y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = join<kRelu>(x[i], f[i]);
}

template <bool kRelu>
static void add_bfloat16(const uint16_t* x, const uint16_t* f, uint16_t* __restrict y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    y[i] = narrow_to_bfloat16(join<kRelu>(widen_bfloat16(x[i]), widen_bfloat16(f[i])));
  }
}

template <bool kRelu>
static void add_float16(const uint16_t* x, const uint16_t* f, uint16_t* __restrict y, int64_t n) {
  int64_t i = 0;
#if GRADPROBE_HAS_F16C
  for (; i + 8 <= n; i += 8) {
    const __m256 of_x = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i)));
    const __m256 of_f = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(f + i)));
    __m256 sum = _mm256_add_ps(of_x, of_f);
    if (kRelu) sum = _mm256_max_ps(_mm256_setzero_ps(), sum);  // gives its second operand for NaN and for two zeros
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
    case Dtype::kFloat64:
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

// By the bits: positive, or NaN of either sign.
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
    case Dtype::kFloat64:
      return mask(static_cast<const double*>(grad_y), static_cast<const double*>(y), static_cast<double*>(grad_x), n);
  }
}

}  // namespace gradprobe::cpu::GRADPROBE_LOOPS

#undef GRADPROBE_LOOPS
#undef GRADPROBE_HAS_F16C
