// The fiber scheduler of emulation.h. Compiled without the thread sanitizer, which would report its switching as races.
#include <algorithm>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "context.h"
#include "emulation.h"

#if defined(EMULATION_ASAN)
#include <sanitizer/common_interface_defs.h>
#elif defined(EMULATION_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

extern "C" char __start_emulated_shared[] __attribute__((weak));
extern "C" char __stop_emulated_shared[] __attribute__((weak));

namespace emulation {

Position* current = nullptr;

namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kMaxThreads = 1024;

enum class State { ready, at_barrier, at_exchange, returned };

struct Fiber {
  Fiber() = default;
  Fiber(const Fiber&) = delete;
#if defined(EMULATION_TSAN)
  ~Fiber() {
    if (tsan) __tsan_destroy_fiber(tsan);
  }
#endif

  Context context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state = State::returned;
  Position position;
  unsigned index = 0;
  int line = 0;       // of the barrier or exchange that the fiber waits at
  unsigned mask = 0;  // of the exchange
  unsigned source = 0;
  uint64_t value = 0;
  bool orders_memory = false;
  bool started = false;
#if defined(EMULATION_ASAN)
  void* fake_stack = nullptr;
#elif defined(EMULATION_TSAN)
  void* tsan = nullptr;
#endif
};

struct Scheduler {
  std::vector<std::unique_ptr<Fiber>> fibers;  // reused by every launch
  Fiber* running = nullptr;
  Context main_context;
  const std::function<void()>* body = nullptr;
  std::mt19937_64 random{1};
  std::string violation;
  unsigned threads = 0;
  std::vector<Fiber*> ready;
  Launches launches{};
  uint64_t first_block = 0;
#if defined(EMULATION_ASAN)
  void* main_fake_stack = nullptr;
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0;
#elif defined(EMULATION_TSAN)
  void* main_tsan = nullptr;
#endif
};

Scheduler scheduler;

char block_order;  // all threads release and acquire it at block barriers and between blocks
char warp_order[kMaxThreads / kWarp];

std::string name(const Fiber& fiber) {
  const Position& p = fiber.position;
  return "block (" + std::to_string(p.block.x) + "," + std::to_string(p.block.y) + ") thread " +
         std::to_string(p.thread.x);
}

void order_release([[maybe_unused]] void* where) {
#if defined(EMULATION_TSAN)
  __tsan_release(where);
#endif
}

void order_acquire([[maybe_unused]] void* where) {
#if defined(EMULATION_TSAN)
  __tsan_acquire(where);
#endif
}

void switch_to_main() {
  Fiber& fiber = *scheduler.running;
#if defined(EMULATION_ASAN)
  __sanitizer_start_switch_fiber(&fiber.fake_stack, scheduler.main_stack, scheduler.main_stack_bytes);
#elif defined(EMULATION_TSAN)
  __tsan_switch_to_fiber(scheduler.main_tsan, __tsan_switch_to_fiber_no_sync);
#endif
  switch_context(fiber.context, scheduler.main_context);
#if defined(EMULATION_ASAN)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

// A fiber runs the body for one block, switches back, and is resumed for the next block.
void fiber_main() {
#if defined(EMULATION_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.main_stack, &scheduler.main_stack_bytes);
#endif
  for (;;) {
    order_acquire(&block_order);
    try {
      (*scheduler.body)();
    } catch (const Violation& violation) {
      if (scheduler.violation.empty()) scheduler.violation = violation.what();
    }
    order_release(&block_order);
    scheduler.running->state = State::returned;
    switch_to_main();
  }
}

void resume(Fiber& fiber) {
  scheduler.running = &fiber;
  current = &fiber.position;
  if (!fiber.started) {
    fiber.started = true;
    start_context(fiber.context, fiber.stack.get(), kStackBytes, fiber_main);
#if defined(EMULATION_TSAN)
    fiber.tsan = __tsan_create_fiber(0);
#endif
  }
#if defined(EMULATION_ASAN)
  __sanitizer_start_switch_fiber(&scheduler.main_fake_stack, fiber.stack.get(), kStackBytes);
#elif defined(EMULATION_TSAN)
  __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  switch_context(scheduler.main_context, fiber.context);
#if defined(EMULATION_ASAN)
  __sanitizer_finish_switch_fiber(scheduler.main_fake_stack, nullptr, nullptr);
#endif
}

// Resumes the threads that wait at the block's barrier. Throws if they do not all wait at the same one.
void release_barrier() {
  const Fiber* first = nullptr;
  for (unsigned t = 0; t < scheduler.threads; ++t) {
    const Fiber& fiber = *scheduler.fibers[t];
    if (fiber.state == State::at_barrier && !first) first = &fiber;
  }
  for (unsigned t = 0; t < scheduler.threads; ++t) {
    const Fiber& fiber = *scheduler.fibers[t];
    if (first && fiber.state == State::at_barrier && fiber.line == first->line) continue;
    if (!first || fiber.state == State::at_exchange) {
      throw Violation("divergent shuffle: " + name(fiber) + " waits at line " + std::to_string(fiber.line) +
                      " for lanes that never come");
    }
    throw Violation(
        "divergent barrier: " + name(*first) + " waits at line " + std::to_string(first->line) + ", " + name(fiber) +
        (fiber.state == State::returned ? " has returned" : " waits at line " + std::to_string(fiber.line)));
  }
  for (unsigned t = 0; t < scheduler.threads; ++t) {
    scheduler.fibers[t]->state = State::ready;
    scheduler.ready.push_back(scheduler.fibers[t].get());
  }
}

void run_block(Index3 block) {
  // Not memset: the sanitizers would attribute it to the kernel.
  for (volatile char* byte = __start_emulated_shared; byte != __stop_emulated_shared; ++byte) *byte = '\xff';
  scheduler.ready.clear();
  for (unsigned t = 0; t < scheduler.threads; ++t) {
    Fiber& fiber = *scheduler.fibers[t];
    fiber.position.block = block;
    fiber.position.thread = {t, 0, 0};
    fiber.state = State::ready;
    scheduler.ready.push_back(&fiber);
  }
  for (;;) {
    while (!scheduler.ready.empty()) {
      const size_t pick = scheduler.random() % scheduler.ready.size();
      std::swap(scheduler.ready[pick], scheduler.ready.back());
      Fiber* fiber = scheduler.ready.back();
      scheduler.ready.pop_back();
      resume(*fiber);
      if (!scheduler.violation.empty()) throw Violation(std::exchange(scheduler.violation, {}));
    }
    bool all_returned = true;
    for (unsigned t = 0; t < scheduler.threads; ++t) all_returned &= scheduler.fibers[t]->state == State::returned;
    if (all_returned) return;
    release_barrier();
  }
}

// Resumes the lanes of the mask once all of them wait at the same exchange.
void try_exchange(Fiber& arrived) {
  const unsigned warp = arrived.index / kWarp;
  for (unsigned l = 0; l < kWarp; ++l) {
    if (!(arrived.mask >> l & 1)) continue;
    const unsigned t = warp * kWarp + l;
    if (t >= scheduler.threads) fail("the mask names lane " + std::to_string(l) + ", which does not exist");
    const Fiber& other = *scheduler.fibers[t];
    if (other.state == State::returned) fail("the mask names lane " + std::to_string(l) + ", which has returned");
    if (other.state != State::at_exchange) return;
    if (other.line != arrived.line || other.mask != arrived.mask) {
      fail("lanes disagree: lane " + std::to_string(l) + " waits at line " + std::to_string(other.line) +
           " with another call or mask");
    }
  }
  uint64_t values[kWarp];
  for (unsigned l = 0; l < kWarp; ++l) {
    if (arrived.mask >> l & 1) values[l] = scheduler.fibers[warp * kWarp + l]->value;
  }
  for (unsigned l = 0; l < kWarp; ++l) {
    if (!(arrived.mask >> l & 1)) continue;
    Fiber& other = *scheduler.fibers[warp * kWarp + l];
    other.value = values[other.source];
    other.state = State::ready;
    if (&other != &arrived) scheduler.ready.push_back(&other);
  }
}

uint64_t wait_for_lanes(unsigned mask, uint64_t value, unsigned source, int line) {
  Fiber& fiber = *scheduler.running;
  if (!(mask >> lane() & 1)) fail("calls a shuffle at line " + std::to_string(line) + " with a mask without itself");
  if (!(mask >> source & 1))
    fail("reads lane " + std::to_string(source) + " at line " + std::to_string(line) + ", outside the mask");
  fiber.state = State::at_exchange;
  fiber.mask = mask;
  fiber.value = value;
  fiber.source = source;
  fiber.line = line;
  try_exchange(fiber);
  if (fiber.state != State::ready) switch_to_main();
  return fiber.value;
}

}  // namespace

void fail(const std::string& what) { throw Violation(name(*scheduler.running) + ": " + what); }

unsigned lane() { return scheduler.running->index % kWarp; }

void seed(uint64_t value) { scheduler.random.seed(value); }

size_t shared_bytes() { return static_cast<size_t>(__stop_emulated_shared - __start_emulated_shared); }

void run_only(uint64_t first) { scheduler.first_block = first; }
uint64_t first_block() { return scheduler.first_block; }

void count_launch(int64_t parameter_bytes) {
  ++scheduler.launches.count;
  scheduler.launches.parameter_bytes += parameter_bytes;
}
Launches take_launches() { return std::exchange(scheduler.launches, {}); }

void barrier(int line) {
  Fiber& fiber = *scheduler.running;
  fiber.state = State::at_barrier;
  fiber.line = line;
  order_release(&block_order);
  switch_to_main();
  order_acquire(&block_order);
}

// Like the hardware, does not order memory.
uint64_t exchange(unsigned mask, uint64_t value, unsigned source, int line) {
  return wait_for_lanes(mask, value, source, line);
}

void warp_barrier(unsigned mask, int line) {
  order_release(&warp_order[scheduler.running->index / kWarp]);
  wait_for_lanes(mask, 0, lane(), line);
  order_acquire(&warp_order[scheduler.running->index / kWarp]);
}

void run_grid(Index3 grid, Index3 block, const std::function<void()>& body) {
  scheduler.threads = block.x * block.y * block.z;
  if (scheduler.threads > kMaxThreads || block.y * block.z != 1)
    throw Violation("only one-dimensional blocks of up to 1024 threads");
  while (scheduler.fibers.size() < scheduler.threads) {
    scheduler.fibers.push_back(std::make_unique<Fiber>());
    scheduler.fibers.back()->index = static_cast<unsigned>(scheduler.fibers.size() - 1);
  }
#if defined(EMULATION_TSAN)
  scheduler.main_tsan = __tsan_get_current_fiber();
  order_release(&block_order);
#endif
  scheduler.body = &body;
  scheduler.ready.reserve(scheduler.threads);  // so that no fiber reallocates it
  for (auto& fiber : scheduler.fibers) {
    fiber->position.block_dim = block;
    fiber->position.grid_dim = grid;
  }
  const uint64_t n_blocks = uint64_t{grid.x} * grid.y * grid.z;
  std::vector<uint64_t> blocks;
  for (uint64_t b = n_blocks > scheduler.first_block ? scheduler.first_block : 0; b < n_blocks; ++b)
    blocks.push_back(b);
  std::shuffle(blocks.begin(), blocks.end(), scheduler.random);
  try {
    for (const uint64_t b : blocks) {
      run_block({static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                 static_cast<unsigned>(b / grid.x / grid.y)});
    }
  } catch (...) {
    scheduler.fibers.clear();  // some are still inside a kernel
    current = nullptr;
    throw;
  }
  order_acquire(&block_order);
  current = nullptr;
}

}  // namespace emulation
