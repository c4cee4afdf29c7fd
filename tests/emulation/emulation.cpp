#include "emulation.h"

#include <sys/mman.h>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace lsc {
namespace emulation {
namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kBlockMemory = 227 << 10;  // what an sm_90 has

#if defined(__x86_64__)

extern "C" void lsc_switch_context(void** from, void* to);
asm(R"(
.text
.globl lsc_switch_context
.hidden lsc_switch_context
.type lsc_switch_context, @function
lsc_switch_context:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size lsc_switch_context, .-lsc_switch_context
)");

struct Context {
  void* stack_pointer = nullptr;

  void prepare(char* stack, size_t bytes, void (*entry)()) {
    auto* top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t(63));
    *--top = nullptr;                          // keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(entry);   // where the first switch returns to
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer = top;
  }
  static void change(Context& from, Context& to) { lsc_switch_context(&from.stack_pointer, to.stack_pointer); }
};

#else

struct Context {
  ucontext_t context;

  void prepare(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack, context.uc_stack.ss_size = bytes, context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};

#endif

enum class State { ready, in_warp, in_block, done };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  uint64_t batch;
};

struct Fiber {
  Context context;
  State state;
  Place place;
  char* stack = nullptr;
  std::vector<Copy> copies;  // under way, in order
  uint64_t batch = 0;        // the one that copies join
};

struct Warp {
  unsigned arrived, done;
  Place place;
  uint64_t round;
  Slot slots[2][kWarpSize];
};

std::string text(const Place& place) {
  return std::string(place.file_name()) + ":" + std::to_string(place.line()) + " in " + place.function_name();
}

// All of a launch; one at a time in a process.
struct Machine {
  Context scheduler;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned char> memory;
  const std::function<void()>* body = nullptr;
  unsigned threads = 0, current = 0, in_block = 0, done = 0;
  int64_t block = 0;
  std::string error;

  void start(unsigned count) {
    if (fibers.size() < count) fibers.resize(count);
    for (unsigned i = 0; i < count; ++i) {
      if (fibers[i].stack) continue;
      void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (stack == MAP_FAILED) throw std::bad_alloc();
      fibers[i].stack = static_cast<char*>(stack);
    }
    threads = count;
    warps.resize(count / kWarpSize);
    memory.resize(kBlockMemory);
  }

  void yield() { Context::change(fibers[current].context, scheduler); }

  void wait(State state, const Place& place) {
    fibers[current].state = state, fibers[current].place = place;
    yield();
  }

  [[noreturn]] void fail(const std::string& what) {
    if (error.empty()) error = what + " (block " + std::to_string(block) + ", thread " + std::to_string(current) + ")";
    fibers[current].state = State::done;
    yield();
    std::abort();  // a failed launch is not gone on with
  }

  void release_block() {
    in_block = 0;
    for (unsigned i = 0; i < threads; ++i) fibers[i].state = State::ready;
  }

  static void entry();
  void run_block(const std::vector<unsigned>& order, size_t used);
};

Machine& machine() {
  static Machine instance;
  return instance;
}

std::mutex launching;
uint32_t seed = 0;
size_t block_memory_used = 0;

void Machine::entry() {
  Machine& m = machine();
  try {
    (*m.body)();
  } catch (const std::exception& error) {
    m.fail(error.what());
  }
  Fiber& self = m.fibers[m.current];
  self.state = State::done;
  ++m.done, ++m.warps[m.current / kWarpSize].done;
  m.yield();
}

void Machine::run_block(const std::vector<unsigned>& order, size_t used) {
  in_block = done = 0;
  std::memset(memory.data(), 0xff, used);
  for (Warp& warp : warps) warp.arrived = warp.done = 0, warp.round = 0;
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i].context.prepare(fibers[i].stack, kStackBytes, &Machine::entry);
    fibers[i].state = State::ready;
    fibers[i].copies.clear(), fibers[i].batch = 0;
  }
  while (done < threads) {
    bool progress = false;
    // a warp goes on as long as it can: its stacks are in cache
    for (unsigned first = 0; first < threads; first += kWarpSize) {
      for (bool again = true; again && error.empty();) {
        again = false;
        for (unsigned i = first; i < first + kWarpSize; ++i) {
          if (fibers[order[i]].state != State::ready) continue;
          current = order[i];
          Context::change(scheduler, fibers[current].context);
          again = progress = true;
          if (!error.empty()) break;
        }
      }
    }
    if (!error.empty()) throw std::runtime_error("emulated kernel: " + error);
    if (!progress && done < threads) {
      std::string what = "threads wait for others that do not come";
      for (unsigned i = 0, told = 0; i < threads && told < 3; ++i) {
        if (fibers[i].state == State::done) continue;
        what += "; thread " + std::to_string(i) + " at " + text(fibers[i].place), ++told;
      }
      if (done) what += "; " + std::to_string(done) + " threads have left";
      throw std::runtime_error("emulated kernel: barrier divergence: " + what);
    }
  }
}

}  // namespace

unsigned thread_index() { return machine().current; }
int64_t block_index() { return machine().block; }

void sync_block(const Place& place) {
  Machine& m = machine();
  if (++m.in_block < m.threads) return m.wait(State::in_block, place);
  const Place own = place;
  for (unsigned i = 0; i < m.threads; ++i) {
    const Fiber& fiber = m.fibers[i];
    if (i != m.current && (fiber.state != State::in_block || fiber.place.line() != own.line())) {
      m.fail("threads meet in different barriers: " + text(own) + " and " + text(fiber.place));
    }
  }
  m.release_block();
}

const Slot* exchange(const void* value, size_t bytes, const Place& place) {
  Machine& m = machine();
  Warp& warp = m.warps[m.current / kWarpSize];
  if (warp.arrived && (warp.place.line() != place.line() || warp.place.column() != place.column())) {
    m.fail("lanes of a warp meet in different collectives: " + text(warp.place) + " and " + text(place));
  }
  Slot* slots = warp.slots[warp.round % 2];
  std::memcpy(slots[m.current % kWarpSize].bytes, value, bytes);
  warp.place = place;
  if (++warp.arrived < kWarpSize) {
    m.wait(State::in_warp, place);
  } else {
    warp.arrived = 0, ++warp.round;
    const unsigned first = m.current / kWarpSize * kWarpSize;
    for (unsigned i = first; i < first + kWarpSize; ++i) m.fibers[i].state = State::ready;
  }
  return slots;
}

uint32_t ballot(bool vote, const Place& place) {
  const Slot* slots = exchange(&vote, sizeof vote, place);
  uint32_t votes = 0;
  for (unsigned i = 0; i < kWarpSize; ++i) votes |= uint32_t(slots[i].bytes[0] != 0) << i;
  return votes;
}

void* block_memory(size_t bytes) {
  if (bytes > kBlockMemory) throw std::runtime_error("more shared memory than a block has");
  // the most that any kernel has asked for: what is filled with NaN before a block
  block_memory_used = std::max(block_memory_used, bytes);
  return machine().memory.data();
}

void copy_later(void* to, const void* from, size_t bytes) {
  Fiber& self = machine().fibers[machine().current];
  for (const Copy& other : self.copies) {
    if (other.to == to) throw std::logic_error("two copies to one place are under way");
  }
  std::memset(to, 0xff, bytes);
  self.copies.push_back({to, from, bytes, self.batch});
}

void end_batch() { ++machine().fibers[machine().current].batch; }

void wait_batches(uint64_t under_way) {
  Fiber& self = machine().fibers[machine().current];
  auto copy = self.copies.begin();
  for (; copy != self.copies.end() && copy->batch + under_way < self.batch; ++copy) std::memcpy(copy->to, copy->from, copy->bytes);
  self.copies.erase(self.copies.begin(), copy);
}

void run(int64_t blocks, unsigned threads, const std::function<void()>& body) {
  const std::lock_guard<std::mutex> only_one(launching);
  Machine& m = machine();
  m.start(threads);
  m.body = &body;
  m.error.clear();
  block_memory_used = kBlockMemory;

  std::vector<unsigned> order(threads), warp_order(threads / kWarpSize);
  std::vector<int64_t> block_order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::iota(block_order.begin(), block_order.end(), int64_t(0));
  if (seed) {
    std::mt19937 random(seed);
    std::iota(warp_order.begin(), warp_order.end(), 0u);
    std::shuffle(warp_order.begin(), warp_order.end(), random);
    for (unsigned i = 0; i < threads; ++i) order[i] = warp_order[i / kWarpSize] * kWarpSize + i % kWarpSize;
    for (unsigned i = 0; i < threads; i += kWarpSize) std::shuffle(&order[i], &order[i] + kWarpSize, random);
    std::shuffle(block_order.begin(), block_order.end(), random);
  }
  for (int64_t each : block_order) {
    m.block = each;
    const size_t used = block_memory_used;
    block_memory_used = 0;
    m.run_block(order, used);
  }
}

// 0: ascending order; otherwise a permutation.
extern "C" __attribute__((visibility("default"))) void lsc_emulation_set_seed(uint32_t value) { seed = value; }

}  // namespace emulation
}  // namespace lsc
