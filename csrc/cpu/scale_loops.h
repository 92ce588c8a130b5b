// The loops of scale_ for one instruction set (see each_isa.h), vectorised by the compiler.

namespace gradprobe::cpu::GRADPROBE_ISA {

static void scale(float* data, int64_t n, float coefficient) {
  for (int64_t i = 0; i < n; ++i) data[i] *= coefficient;
}

static void scale(double* data, int64_t n, double coefficient) {
  for (int64_t i = 0; i < n; ++i) data[i] *= coefficient;
}

static void scale_bfloat16(uint16_t* data, int64_t n, float coefficient) {
  for (int64_t i = 0; i < n; ++i) data[i] = narrow_to_bfloat16(widen_bfloat16(data[i]) * coefficient);
}

static void scale_float16(uint16_t* data, int64_t n, float coefficient) {
  int64_t i = 0;
#if GRADPROBE_HAS_F16C
  const __m256 factor = _mm256_set1_ps(coefficient);
  for (; i + 8 <= n; i += 8) {
    const __m256 x = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data + i)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(data + i),
                     _mm256_cvtps_ph(_mm256_mul_ps(x, factor), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#endif
  for (; i < n; ++i) data[i] = narrow_to_float16(widen_float16(data[i]) * coefficient);
}

static void scale_elements(Dtype dtype, void* data, int64_t n, double coefficient) {
  switch (dtype) {
    case Dtype::kFloat16:
      return scale_float16(static_cast<uint16_t*>(data), n, static_cast<float>(coefficient));
    case Dtype::kBFloat16:
      return scale_bfloat16(static_cast<uint16_t*>(data), n, static_cast<float>(coefficient));
    case Dtype::kFloat32:
      return scale(static_cast<float*>(data), n, static_cast<float>(coefficient));
    default:  // float64
      return scale(static_cast<double*>(data), n, coefficient);
  }
}

}  // namespace gradprobe::cpu::GRADPROBE_ISA
