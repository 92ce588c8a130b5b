// PTX instructions as C++ functions, for the translated kernels. An instruction is the function op_<its name and
// modifiers>; its types are template arguments. Source: NVIDIA, "PTX ISA" 9.0, chapter 9.
//
// The including file defines the array `shared`.
#pragma once

#include <cmath>
#include <string>

#include "machine.h"
#include "registers.h"

namespace {  // every translated file has its own shared memory

// ---- Memory

template <typename T, int n>
using Loaded = std::conditional_t<n == 1, T, std::array<T, n>>;

template <typename Access>
void check_aligned(u64 address) {
  if (address % sizeof(Access) != 0)
    emulation::fail("misaligned access of " + std::to_string(sizeof(Access)) + " bytes");
}

template <typename T, int n = 1>
Loaded<T, n> op_ld_param(u64 address) {
  Loaded<T, n> value;
  std::memcpy(&value, reinterpret_cast<const void*>(address), sizeof value);
  return value;
}

template <typename T, int n = 1>
Loaded<T, n> op_ld_global(u64 address) {
  check_aligned<Loaded<T, n>>(address);
  ptx::traffic.loaded += sizeof(Loaded<T, n>);
  return op_ld_param<T, n>(address);
}
template <typename T, int n = 1>
Loaded<T, n> op_ld_global_nc(u64 address) {
  return op_ld_global<T, n>(address);
}
template <typename T, int n = 1>
Loaded<T, n> op_ld_global_cg(u64 address) {
  return op_ld_global<T, n>(address);
}

template <typename T, int n = 1>
void op_st_global(u64 address, Loaded<T, n> value) {
  check_aligned<Loaded<T, n>>(address);
  ptx::traffic.stored += sizeof value;
  std::memcpy(reinterpret_cast<void*>(address), &value, sizeof value);
}
template <typename T, int n = 1>
void op_st_global_cg(u64 address, Loaded<T, n> value) {
  op_st_global<T, n>(address, value);
}

template <typename Access>
char* shared_at(u64 address) {
  check_aligned<Access>(address);
  if (address + sizeof(Access) > sizeof shared) emulation::fail("access outside shared memory");
  return shared + address;
}

template <typename T, int n = 1>
Loaded<T, n> op_ld_shared(u64 address) {
  return op_ld_param<T, n>(reinterpret_cast<u64>(shared_at<Loaded<T, n>>(address)));
}
template <typename T>
void op_st_shared(u64 address, T value) {
  std::memcpy(shared_at<T>(address), &value, sizeof value);
}

// Threads are fibers of one thread, which do not interrupt each other.
template <Integer T>
T op_atom_shared_add(u64 address, T value) {
  const T before = op_ld_shared<T>(address);
  op_st_shared<T>(address, before + value);
  return before;
}

template <typename T>
T op_cvta_to_global(T address) {
  return address;
}

// ---- Between threads

void op_bar_sync(u32 barrier, int line = __builtin_LINE()) {
  if (barrier != 0) emulation::fail("barrier " + std::to_string(barrier) + ": only number 0 is known");
  emulation::barrier(line);
}

template <typename T>
std::pair<T, bool> op_shfl_sync_down(T value, u32 delta, u32 limits, u32 mask, int line = __builtin_LINE()) {
  const u32 lane = emulation::lane();
  const u32 segment = limits >> 8 & 31;
  const u32 last = (lane & segment) | (limits & 31 & ~segment);
  const bool is_inside = lane + (delta & 31) <= last;
  return {emulation::shuffle(mask, value, is_inside ? lane + (delta & 31) : lane, line), is_inside};
}

// ---- Integers and bits

template <typename T>
T op_mov(T a) {
  return a;
}
template <typename T>
T op_selp(T a, T b, bool condition) {
  return condition ? a : b;
}
template <std::integral T>
T op_and(T a, T b) {
  return a & b;
}
template <std::integral T>
T op_or(T a, T b) {
  return a | b;
}
template <std::integral T>
T op_xor(T a, T b) {
  return a ^ b;
}
template <std::integral T>
T op_not(T a) {
  return std::is_same_v<T, bool> ? !a : static_cast<T>(~u64{a});
}
template <Integer T>
T op_shl(T a, T bits) {
  return u64(bits) < 8 * sizeof a ? a << bits : 0;
}
template <Integer T>
T op_shr(T a, T bits) {
  return u64(bits) < 8 * sizeof a ? a >> bits : a < 0 ? -1 : 0;
}

// Puts the lowest `length` bits of a at bit `start` of b.
template <Integer T>
T op_bfi(T a, T b, T start, T length) {
  const T mask = op_shl<T>(~op_shl<T>(~T{0}, length), start);
  return (op_shl<T>(a, start) & mask) | (b & ~mask);
}

template <Integer T>
T op_add(T a, T b) {
  return a + b;
}
template <Integer T>
T op_sub(T a, T b) {
  return a - b;
}
template <Integer T>
T op_mul_lo(T a, T b) {
  return a * b;
}
template <Integer T>
T op_mad_lo(T a, T b, T c) {
  return a * b + c;
}
template <Integer T>
T op_div(T a, T b) {
  return a / b;
}
template <Integer T>
auto op_mul_wide(T a, T b) {
  using Wide = std::conditional_t<std::is_signed_v<T>, s64, u64>;
  static_assert(sizeof(T) == 4);
  return Wide{a} * Wide{b};
}
template <Integer T>
T op_neg(T a) {
  return -a;
}
template <Integer T>
T op_min(T a, T b) {
  return a < b ? a : b;
}
template <Integer T>
T op_max(T a, T b) {
  return a > b ? a : b;
}

// ---- Floating point: round to nearest even, with subnormals

// A NaN that float arithmetic returns has one bit pattern.
template <Real T>
T result(T x) {
  return std::is_same_v<T, f32> && x != x ? std::bit_cast<f32>(0x7fffffffu) : x;
}

template <Real T>
T op_add(T a, T b) {
  return result(a + b);
}
template <Real T>
T op_sub(T a, T b) {
  return result(a - b);
}
template <Real T>
T op_mul(T a, T b) {
  return result(a * b);
}
template <Real T>
T op_fma_rn(T a, T b, T c) {
  return result(std::fma(a, b, c));
}
template <Real T>
T op_div_rn(T a, T b) {
  return result(a / b);
}
template <Real T>
T op_sqrt_rn(T a) {
  return result(std::sqrt(a));
}
template <Real T>
T op_neg(T a) {
  return -a;
}
template <Real T>
T op_abs(T a) {
  return std::fabs(a);
}

// A NaN loses against a number, and -0 is less than +0.
template <Real T>
T op_max(T a, T b) {
  if (a != a || b != b) return result(a != a ? b : a);
  return a > b || (a == b && !std::signbit(a)) ? a : b;
}
template <Real T>
T op_min(T a, T b) {
  if (a != a || b != b) return result(a != a ? b : a);
  return a < b || (a == b && std::signbit(a)) ? a : b;
}

// ---- Conversions

template <typename D, typename S>
D op_cvt(S a) {
  if constexpr (std::is_same_v<S, f16>) {
    return __half2float(a);
  } else if constexpr (std::is_same_v<S, bf16>) {
    return __bfloat162float(a);
  } else {
    static_assert((Integer<D> && Integer<S>) || (std::is_same_v<D, f64> && std::is_same_v<S, f32>));
    return static_cast<D>(a);
  }
}

template <typename D, typename S>
D op_cvt_rn(S a) {
  if constexpr (std::is_same_v<D, f16>) {
    return __float2half_rn(a);
  } else if constexpr (std::is_same_v<D, bf16>) {
    return __float2bfloat16_rn(a);
  } else {
    static_assert(Real<D>);
    return result(static_cast<D>(a));
  }
}

// ---- Pairs of 16-bit numbers

f32 wide(f16 x) { return op_cvt<f32>(x); }
f32 wide(bf16 x) { return op_cvt<f32>(x); }

template <Pair T>
T op_abs(T a) {
  return std::bit_cast<T>(std::bit_cast<u32>(a) & 0x7fff7fffu);
}

// Every float that it rounds is one of the type's numbers.
template <Pair T, typename Function>
T of_each(T a, T b, Function function) {
  using Half = decltype(a.x);
  return {op_cvt_rn<Half>(function(wide(a.x), wide(b.x))), op_cvt_rn<Half>(function(wide(a.y), wide(b.y)))};
}
template <Pair T>
T op_max(T a, T b) {
  return of_each(a, b, [](f32 of_a, f32 of_b) { return op_max(of_a, of_b); });
}
template <Pair T>
T op_min(T a, T b) {
  return of_each(a, b, [](f32 of_a, f32 of_b) { return op_min(of_a, of_b); });
}

// Sets all bits of a half, or makes it 1.
template <typename D, Pair S>
D op_set_gt(S a, S b) {
  const bool low = wide(a.x) > wide(b.x);
  const bool high = wide(a.y) > wide(b.y);
  if constexpr (Integer<D>) {
    return (low ? 0xffffu : 0u) | (high ? 0xffff0000u : 0u);
  } else {
    using Half = decltype(a.x);
    return {op_cvt_rn<Half>(low ? 1.0f : 0.0f), op_cvt_rn<Half>(high ? 1.0f : 0.0f)};
  }
}

// ---- Comparisons. The first six are false if an operand is NaN, those with a "u" true.

template <typename T>
bool is_nan(T x) {
  return x != x;
}
template <typename T>
bool op_setp_nan(T a, T b) {
  return is_nan(a) || is_nan(b);
}
template <typename T>
bool op_setp_num(T a, T b) {
  return !op_setp_nan(a, b);
}
template <typename T>
bool op_setp_eq(T a, T b) {
  return a == b;
}
template <typename T>
bool op_setp_ne(T a, T b) {
  return a != b && op_setp_num(a, b);
}
template <typename T>
bool op_setp_lt(T a, T b) {
  return a < b;
}
template <typename T>
bool op_setp_le(T a, T b) {
  return a <= b;
}
template <typename T>
bool op_setp_gt(T a, T b) {
  return a > b;
}
template <typename T>
bool op_setp_ge(T a, T b) {
  return a >= b;
}
template <Real T>
bool op_setp_equ(T a, T b) {
  return !op_setp_ne(a, b);
}
template <Real T>
bool op_setp_neu(T a, T b) {
  return a != b;
}
template <Real T>
bool op_setp_ltu(T a, T b) {
  return !(a >= b);
}
template <Real T>
bool op_setp_leu(T a, T b) {
  return !(a > b);
}
template <Real T>
bool op_setp_gtu(T a, T b) {
  return !(a <= b);
}
template <Real T>
bool op_setp_geu(T a, T b) {
  return !(a < b);
}

}  // namespace
