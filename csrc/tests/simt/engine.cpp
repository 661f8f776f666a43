#include <sys/mman.h>
#include <ucontext.h>

#include <array>
#include <bit>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "simt/sanitizers.h"
#include "simt/simt.h"

namespace simt {
namespace {

constexpr unsigned kWarp = 32, kMaxThreads = 1024;
constexpr unsigned kMaxMasks = 8;  // that the lanes of a warp wait with, while one block runs
constexpr size_t kStackBytes = 256 << 10, kGuardBytes = 1 << 16;

// A set of threads that wait for each other again and again. What belongs to a round lies at its parity: a thread
// can be one round ahead of another, but not two.
struct Meeting {
  unsigned arrived = 0;
  uint64_t round = 0;
  std::array<std::array<uint64_t, kWarp>, 2> bits{};
  std::array<char, 2> sync{};
};

struct Fiber {
  Thread thread;
  ucontext_t context;
  SanitizedFiber sanitized;
  char* stack = nullptr;
  const char* waits_in = nullptr;
  bool done = true;

  void start() {
    if (!stack) {
      void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      mprotect(memory, kGuardBytes, PROT_NONE);
      stack = static_cast<char*>(memory) + kGuardBytes;
    }
    sanitized.start(stack, kStackBytes);
    done = false;
  }
};

std::mutex one_launch, one_count;
std::map<std::string, int64_t> launches;
std::array<Fiber, kMaxThreads + 1> fibers;
Fiber& host = fibers[kMaxThreads];
Fiber *running = &host, *came_from = &host;
unsigned fiber_count, live;
unsigned idle;  // switches since something last happened
const std::function<void()>* body;
Block current_block;
void* shared_memory;
Meeting whole_block;

// Of the lanes of each warp, by mask. Not on the heap: a fiber's allocations are races to ThreadSanitizer.
struct MaskedMeeting {
  uint32_t mask = 0;
  Meeting meeting;
};
std::array<std::array<MaskedMeeting, kMaxMasks>, kMaxThreads / kWarp> lanes;

char block_start, block_end;

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
  std::fputs("simt: ", stderr);
  va_list values;
  va_start(values, format);
  std::vfprintf(stderr, format, values);
  va_end(values);
  std::fputs(".\n", stderr);
  std::_Exit(1);
}

[[noreturn]] void fail_deadlock() {
  std::map<const char*, unsigned> waiting;
  for (unsigned i = 0; i < fiber_count; ++i) {
    if (!fibers[i].done) ++waiting[fibers[i].waits_in];
  }
  for (const auto& [name, count] : waiting) std::fprintf(stderr, "simt: %u threads wait in %s\n", count, name);
  fail("deadlock in block (%u, %u, %u), which %u of its threads have left", current_block.index.x,
       current_block.index.y, current_block.index.z, fiber_count - live);
}

void switch_to(Fiber& next) {
  Fiber& self = *running;
  if (&self == &next) return;
  came_from = &self;
  running = &next;
  self.sanitized.before_switch_to(next.sanitized, self.done && &self != &host);
  swapcontext(&self.context, &next.context);
  self.sanitized.after_switch(came_from->sanitized);
}

Fiber& next_fiber() {
  unsigned i = running->thread.number;
  do i = (i + 1) % fiber_count;
  while (fibers[i].done);
  return fibers[i];
}

void fiber_main() {
  running->sanitized.after_switch(came_from->sanitized);
  acquire(&block_start);
  (*body)();
  release(&block_end);
  running->done = true;
  --live;
  idle = 0;
  switch_to(live ? next_fiber() : host);
}

// Returns the parity of the round that the `size` threads met in.
unsigned meet(const char* name, Meeting& meeting, unsigned size, bool orders_memory) {
  const uint64_t round = meeting.round;
  const unsigned parity = round % 2;
  if (orders_memory) release(&meeting.sync[parity]);
  idle = 0;
  if (++meeting.arrived == size) {
    meeting.arrived = 0;
    ++meeting.round;
  } else {
    running->waits_in = name;
    while (meeting.round == round) {
      if (++idle > live) fail_deadlock();
      switch_to(next_fiber());
    }
  }
  if (orders_memory) acquire(&meeting.sync[parity]);
  return parity;
}

Meeting& meeting_of(unsigned warp, uint32_t mask) {
  for (MaskedMeeting& masked : lanes[warp]) {
    if (masked.mask == mask) return masked.meeting;
    if (masked.mask) continue;
    masked = {mask, {}};
    return masked.meeting;
  }
  fail("a warp waits with more than %u masks", kMaxMasks);
}

void run_block(size_t shared_bytes) {
  const std::unique_ptr<unsigned char[]> shared(new unsigned char[shared_bytes]);
  std::memset(shared.get(), 0xff, shared_bytes);
  shared_memory = shared.get();
  whole_block = {};
  for (unsigned warp = 0; warp * kWarp < fiber_count; ++warp) {
    for (MaskedMeeting& masked : lanes[warp]) masked.mask = 0;
  }
  live = fiber_count;
  idle = 0;
  for (unsigned i = 0; i < fiber_count; ++i) {
    const dim3 size = current_block.threads;
    fibers[i].thread = {dim3(i % size.x, i / size.x % size.y, i / size.x / size.y), i};
    fibers[i].start();
    getcontext(&fibers[i].context);
    fibers[i].context.uc_stack.ss_sp = fibers[i].stack;
    fibers[i].context.uc_stack.ss_size = kStackBytes;
    makecontext(&fibers[i].context, fiber_main, 0);
  }
  release(&block_start);
  switch_to(fibers[0]);
  acquire(&block_end);
}

}  // namespace

const Thread& thread() { return running->thread; }
const Block& block() { return current_block; }
void* dynamic_shared() { return shared_memory; }

// A thread that has left is not waited for by a GPU, but what CUDA promises is for barriers that all threads
// reach.
void wait_for_block() { meet("__syncthreads", whole_block, fiber_count, true); }

uint64_t exchange(const char* name, uint32_t mask, uint64_t bits, unsigned source, bool orders_memory) {
  const unsigned warp = running->thread.number / kWarp, lane = running->thread.number % kWarp;
  if (!(mask >> lane & 1)) fail("%s by lane %u, which its mask %#x does not name", name, lane, mask);
  if (!(mask >> source & 1)) fail("%s reads lane %u, which its mask %#x does not name", name, source, mask);
  Meeting& meeting = meeting_of(warp, mask);
  meeting.bits[meeting.round % 2][lane] = bits;
  return meeting.bits[meet(name, meeting, std::popcount(mask), orders_memory)][source];
}

void count_launch(const char* name) {
  const std::lock_guard lock(one_count);
  ++launches[name];
}

std::map<std::string, int64_t> take_launches() {
  const std::lock_guard lock(one_count);
  return std::exchange(launches, {});
}

void run(dim3 grid, dim3 threads, size_t shared_bytes, const std::function<void()>& kernel) {
  const std::lock_guard lock(one_launch);
  const uint64_t count = uint64_t{threads.x} * threads.y * threads.z;
  if (count == 0 || count > kMaxThreads) fail("a block has 1 to %u threads, got %lu", kMaxThreads, count);
  if (grid.x >= 1u << 31 || grid.y >= 1u << 16 || grid.z >= 1u << 16) {
    fail("a grid has less than 2^31 x 2^16 x 2^16 blocks, got %u x %u x %u", grid.x, grid.y, grid.z);
  }
  fiber_count = static_cast<unsigned>(count);
  body = &kernel;
  host.sanitized.adopt_thread();
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        current_block = {dim3(x, y, z), threads, grid};
        run_block(shared_bytes);
      }
    }
  }
}

}  // namespace simt
