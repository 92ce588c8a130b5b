// Compiler macros to compile the CPU kernels for several instruction sets.
#pragma once

#include "cpu/kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define GRADPROBE_X86_LEVELS
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
// Concerns vector arguments of functions; ours are always inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
// GCC's AVX-512 headers use undefined registers on purpose (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

// The function `function`, compiled for the instruction set `isa`.
#if defined(GRADPROBE_X86_LEVELS)
#define GRADPROBE_CHOOSE(isa, function)                        \
  ((isa) == ::gradprobe::cpu::Isa::kAvx512 ? &avx512::function \
   : (isa) == ::gradprobe::cpu::Isa::kAvx2 ? &avx2::function   \
                                           : &baseline::function)
#else
#define GRADPROBE_CHOOSE(isa, function) (static_cast<void>(isa), &baseline::function)
#endif

// Before a loop, promises that no iteration accesses memory that another one writes.
#if defined(__clang__)
#define GRADPROBE_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define GRADPROBE_INDEPENDENT _Pragma("GCC ivdep")
#endif
