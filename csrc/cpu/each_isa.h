// Includes the file GRADPROBE_PER_ISA once for each instruction set, with the compiler's target set to match and
//   GRADPROBE_ISA           the namespace: baseline, avx2, avx512
//   GRADPROBE_VECTOR_BYTES  the width of a register: 16, 32 or 64
//   GRADPROBE_HAS_F16C      1 if the processor converts float16
// Hence neither file has an include guard, and system headers must be included before this one.

#define GRADPROBE_ISA baseline
#define GRADPROBE_VECTOR_BYTES 16
#define GRADPROBE_HAS_F16C 0
#include GRADPROBE_PER_ISA
#undef GRADPROBE_ISA
#undef GRADPROBE_VECTOR_BYTES
#undef GRADPROBE_HAS_F16C

#if defined(GRADPROBE_X86_LEVELS)
#define GRADPROBE_HAS_F16C 1

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define GRADPROBE_ISA avx2
#define GRADPROBE_VECTOR_BYTES 32
#include GRADPROBE_PER_ISA
#undef GRADPROBE_ISA
#undef GRADPROBE_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("popcnt,avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("popcnt,avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define GRADPROBE_ISA avx512
#define GRADPROBE_VECTOR_BYTES 64
#include GRADPROBE_PER_ISA
#undef GRADPROBE_ISA
#undef GRADPROBE_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#undef GRADPROBE_HAS_F16C
#endif  // GRADPROBE_X86_LEVELS

#undef GRADPROBE_PER_ISA
