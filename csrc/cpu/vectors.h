// The registers of one instruction set (see each_isa.h).

namespace gradprobe::cpu::GRADPROBE_ISA {

constexpr int kBytes = GRADPROBE_VECTOR_BYTES;
constexpr int kFloats = kBytes / 4;
constexpr int kDoubles = kBytes / 8;

typedef float Floats __attribute__((vector_size(kBytes)));
typedef int32_t Ints __attribute__((vector_size(kBytes)));
typedef double Doubles __attribute__((vector_size(kBytes)));
typedef int64_t Longs __attribute__((vector_size(kBytes)));
typedef uint16_t Shorts __attribute__((vector_size(kBytes)));

template <typename Vector>
static inline __attribute__((always_inline)) Vector load(const void* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof vector);
  return vector;
}

}  // namespace gradprobe::cpu::GRADPROBE_ISA
