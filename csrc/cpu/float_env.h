// While a FloatEnvironment exists, its thread computes with subnormal numbers, even if the caller flushes them
// (torch.set_flush_denormal). Its destructor restores the caller's mode.
#pragma once

#include <cstdint>

#if defined(__x86_64__) || defined(__i386__)
#include <xmmintrin.h>
#endif

namespace gradprobe::cpu {

class FloatEnvironment {
 public:
  FloatEnvironment() : saved_(read()) { write(saved_ & ~kFlush); }
  ~FloatEnvironment() { write(saved_); }
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;

  // Whether this thread flushes subnormal numbers now.
  static bool flushes() { return (read() & kFlush) != 0; }

 private:
#if defined(__x86_64__) || defined(__i386__)
  using Word = uint32_t;
  static constexpr Word kFlush = 0x8040;  // flush-to-zero, denormals-are-zero
  static Word read() { return _mm_getcsr(); }
  static void write(Word word) { _mm_setcsr(word); }
#elif defined(__aarch64__)
  using Word = uint64_t;
  static constexpr Word kFlush = (Word{1} << 24) | (Word{1} << 19);  // FZ, FZ16
  static Word read() {
    Word word;
    __asm__ volatile("mrs %0, fpcr" : "=r"(word)::"memory");
    return word;
  }
  static void write(Word word) { __asm__ volatile("msr fpcr, %0" ::"r"(word) : "memory"); }
#else
  using Word = uint32_t;
  static constexpr Word kFlush = 0;
  static Word read() { return 0; }
  static void write(Word) {}
#endif
  Word saved_;
};

}  // namespace gradprobe::cpu
