// What kernels.cu takes from CUDA, for g++: a block is run thread by thread.
//
// Kernels that name a barrier or a shuffle run each thread on a stack of its own. A thread that reaches a barrier waits
// until the whole block has, one that reaches a shuffle until its warp has; a block whose threads wait for different
// things, or of which some have ended, stops the process, because on a GPU that is undefined.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

struct Dim {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline Dim threadIdx, blockIdx, blockDim, gridDim;

#define __global__
#define __device__
#define __shared__ static  // blocks run one after the other

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }

inline float half_to_float(unsigned short bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return (float)value;
}
inline unsigned short float_to_half(float value) {
  const _Float16 narrow = (_Float16)value;
  unsigned short bits;
  std::memcpy(&bits, &narrow, 2);
  return bits;
}

// --- Threads of a block ----------------------------------------------------------------------------------------------

[[noreturn]] inline void undefined_on_a_gpu(const char* what) {
  std::fprintf(stderr, "emulated GPU: %s\n", what);
  std::abort();
}

enum class Waits { nothing, block, warp, ended };

struct Fiber {
  ucontext_t entry;  // for the first switch; those after it are jumps, which cost no call of the system
  jmp_buf place;
  bool started = false;
  std::vector<char> stack;
  Waits waits = Waits::nothing;
  float offered = 0;
};

struct Block {
  std::vector<Fiber> fibers;
  jmp_buf scheduler;
  unsigned current = 0;
  const std::function<void()>* body = nullptr;
};
inline Block running;
constexpr unsigned WARP_SIZE = 32;

inline void wait_for(Waits what) {
  if (running.body == nullptr) undefined_on_a_gpu("a barrier in a kernel that is run as a loop");
  Fiber& self = running.fibers[running.current];
  self.waits = what;
  if (!_setjmp(self.place)) _longjmp(running.scheduler, 1);
}
inline void __syncthreads() { wait_for(Waits::block); }

inline float __shfl_down_sync(unsigned mask, float value, unsigned offset) {
  if (mask != 0xffffffffu) undefined_on_a_gpu("a shuffle of a part of a warp");
  const unsigned own = running.current, lane = own % WARP_SIZE;
  running.fibers[own].offered = value;
  wait_for(Waits::warp);  // all have offered
  const float got = lane + offset < WARP_SIZE ? running.fibers[own + offset].offered : value;
  wait_for(Waits::warp);  // all have taken
  return got;
}

inline void fiber_main() {
  (*running.body)();
  running.fibers[running.current].waits = Waits::ended;
  _longjmp(running.scheduler, 1);
}

inline void go_on(Fiber& fiber) {
  if (_setjmp(running.scheduler)) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.entry);
}

inline void place_thread(unsigned number) {
  threadIdx = {number % blockDim.x, number / blockDim.x, 0};
}

inline bool all_wait(size_t first, size_t last, Waits what) {
  for (size_t i = first; i < last; ++i)
    if (running.fibers[i].waits != what) return false;
  return true;
}

inline void release(size_t first, size_t last) {
  for (size_t i = first; i < last; ++i) running.fibers[i].waits = Waits::nothing;
}

// Runs every thread that may go on, the last ones first in every other round: no order is promised.
inline void run_block_with_barriers(const std::function<void()>& body) {
  const unsigned count = blockDim.x * blockDim.y;
  if (count % WARP_SIZE) undefined_on_a_gpu("a shuffle in a block that is not made of whole warps");
  running.fibers.resize(count);
  running.body = &body;
  for (Fiber& fiber : running.fibers) {
    fiber.stack.resize(1 << 16);
    fiber.waits = Waits::nothing;
    fiber.started = false;
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = fiber.stack.data();
    fiber.entry.uc_stack.ss_size = fiber.stack.size();
    fiber.entry.uc_link = nullptr;
    makecontext(&fiber.entry, fiber_main, 0);
  }
  for (unsigned round = 0; !all_wait(0, count, Waits::ended); ++round) {
    bool moved = false;
    for (unsigned i = 0; i < count; ++i) {
      const unsigned number = round % 2 ? count - 1 - i : i;
      if (running.fibers[number].waits != Waits::nothing) continue;
      running.current = number;
      place_thread(number);
      go_on(running.fibers[number]);
      moved = true;
    }
    for (unsigned warp = 0; warp < count; warp += WARP_SIZE)
      if (all_wait(warp, warp + WARP_SIZE, Waits::warp)) release(warp, warp + WARP_SIZE), moved = true;
    if (all_wait(0, count, Waits::block)) release(0, count), moved = true;
    if (!moved) undefined_on_a_gpu("threads of a block wait for different things, or some have ended");
  }
  running.body = nullptr;
}

inline void run_grid(Dim grid, Dim block, bool barriers, const std::function<void()>& body) {
  gridDim = grid;
  blockDim = block;
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = {x, y, 0};
      if (barriers) {
        run_block_with_barriers(body);
        continue;
      }
      for (unsigned number = 0; number < block.x * block.y; ++number) {
        place_thread(number);
        body();
      }
    }
}

// --- Kernels by name -------------------------------------------------------------------------------------------------

struct KernelEntry {
  bool barriers;
  // Copies the arguments, as a launch does, and returns what runs one thread.
  std::function<std::function<void()>(void**)> prepare;
};
inline std::map<std::string, KernelEntry>& kernels() {
  static std::map<std::string, KernelEntry> table;
  return table;
}

template <typename... Arguments, size_t... I>
std::function<void()> prepared(void (*kernel)(Arguments...), void** values, std::index_sequence<I...>) {
  auto copied = std::make_tuple(*static_cast<std::decay_t<Arguments>*>(values[I])...);
  return [kernel, copied] { std::apply(kernel, copied); };
}

struct Registration {
  template <typename... Arguments>
  Registration(const char* name, void (*kernel)(Arguments...)) {
    bool barriers = false;
    for (const char* kind : {"similarity", "choose", "feed"}) barriers |= std::string(name).rfind(kind, 0) == 0;
    kernels()[name] = {barriers, [kernel](void** values) {
                         return prepared(kernel, values, std::index_sequence_for<Arguments...>());
                       }};
  }
};
#define KERNEL(name, parameters, call) \
  static void name parameters { call; } \
  static const Registration registered_##name(#name, name);
