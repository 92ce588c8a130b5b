// Functions of pairs of 16-bit numbers, through float, which holds their values exactly. As on a device, a NaN loses
// against a number.
#pragma once

#include <cmath>

#define EMULATED_PAIR(Pair, to_float, from_float)                                                                      \
  inline float __low2float(Pair a) { return to_float(a.x); }                                                           \
  inline float __high2float(Pair a) { return to_float(a.y); }                                                          \
  inline Pair __habs2(Pair a) { return {from_float(std::fabs(to_float(a.x))), from_float(std::fabs(to_float(a.y)))}; } \
  inline Pair __hmax2(Pair a, Pair b) {                                                                                \
    return {from_float(std::fmax(to_float(a.x), to_float(b.x))), from_float(std::fmax(to_float(a.y), to_float(b.y)))}; \
  }                                                                                                                    \
  inline Pair __hmin2(Pair a, Pair b) {                                                                                \
    return {from_float(std::fmin(to_float(a.x), to_float(b.x))), from_float(std::fmin(to_float(a.y), to_float(b.y)))}; \
  }                                                                                                                    \
  inline bool __hbgt2(Pair a, Pair b) { return to_float(a.x) > to_float(b.x) && to_float(a.y) > to_float(b.y); }
