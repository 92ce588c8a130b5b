// The instruction sets that the CPU kernels are compiled for, and what their files need for it.
#pragma once

#include "cpu/kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define GRADPROBE_X86_LEVELS
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
// Vectors never cross the boundary of a function that is not inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
// GCC's own AVX-512 headers start from a register that they leave undefined on purpose (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

// The function of that name for an instruction set.
#if defined(GRADPROBE_X86_LEVELS)
#define GRADPROBE_CHOOSE(isa, function)                        \
  ((isa) == ::gradprobe::cpu::Isa::kAvx512 ? &avx512::function \
   : (isa) == ::gradprobe::cpu::Isa::kAvx2 ? &avx2::function   \
                                           : &baseline::function)
#else
#define GRADPROBE_CHOOSE(isa, function) (static_cast<void>(isa), &baseline::function)
#endif

// Before a loop: no iteration touches memory that another writes.
#if defined(__clang__)
#define GRADPROBE_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define GRADPROBE_INDEPENDENT _Pragma("GCC ivdep")
#endif
