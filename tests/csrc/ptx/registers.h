// The types and registers of PTX. A register is an unsigned integer of its width, or a bool; `get` reads it as a type,
// and `put` writes it.
#pragma once

#include <array>
#include <bit>
#include <concepts>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "emulation.h"

namespace {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using b8 = u8;
using b16 = u16;
using b32 = u32;
using b64 = u64;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f16 = __half;
using bf16 = __nv_bfloat16;
using f16x2 = __half2;
using bf16x2 = __nv_bfloat162;
using f32 = float;
using f64 = double;
using pred = bool;

template <typename T>
concept Integer = std::integral<T> && !std::same_as<T, bool>;
template <typename T>
concept Real = std::floating_point<T>;
template <typename T>
concept Pair = std::same_as<T, f16x2> || std::same_as<T, bf16x2>;
template <typename T>
using Unsigned =
    std::conditional_t<sizeof(T) == 1, u8,
                       std::conditional_t<sizeof(T) == 2, u16, std::conditional_t<sizeof(T) == 4, u32, u64>>>;

// Reads the lower bits of a register or an immediate. A predicate is a predicate in every instruction.
template <typename T, typename Register>
auto get(Register bits) {
  if constexpr (std::is_same_v<Register, bool> || std::is_same_v<T, bool>) {
    return bits != 0;
  } else {
    return std::bit_cast<T>(static_cast<Unsigned<T>>(bits));
  }
}

// Writes a register. A wider one is extended with the value's sign, or zeros if it has none.
template <typename T, typename Register>
void put(const T& value, Register& out) {
  if constexpr (std::integral<T>) {
    out = static_cast<Register>(value);
  } else {
    out = std::bit_cast<Unsigned<T>>(value);
  }
}

template <typename T, size_t n, typename... Registers>
void put(const std::array<T, n>& value, Registers&... out) {
  static_assert(sizeof...(out) == n);
  size_t k = 0;
  (put(value[k++], out), ...);
}

template <typename T, typename Register>
void put(const std::pair<T, bool>& value, Register& out, bool& flag) {
  put(value.first, out);
  flag = value.second;
}

// Takes a register apart, the lowest bits first.
template <Integer T, typename Register, typename... Registers>
  requires(sizeof...(Registers) > 0)
void put(T value, Register& first, Registers&... rest) {
  static_assert(sizeof(T) == (sizeof(first) + ... + sizeof(rest)));
  u64 left = value;
  const auto take = [&left](auto& out) {
    put(left, out);
    left >>= 8 * sizeof out;
  };
  take(first);
  (take(rest), ...);
}

template <Integer T, typename... Rest>
u64 pack(T lowest, Rest... rest) {
  if constexpr (sizeof...(rest) == 0) {
    return lowest;
  } else {
    return u64{lowest} | pack(rest...) << 8 * sizeof lowest;
  }
}

u32 tid_x() { return emulation::current->thread.x; }
u32 ctaid_x() { return emulation::current->block.x; }
u32 nctaid_x() { return emulation::current->grid_dim.x; }

// An address with the offset of an instruction.
template <typename Register>
Register at(Register base, s64 offset) {
  return static_cast<Register>(base + offset);
}

}  // namespace
