// What AddressSanitizer and ThreadSanitizer must know of fibers; nothing without them. CMake defines SIMT_ASAN and
// SIMT_TSAN, since the engine itself is not instrumented for threads.
#pragma once

#include <cstddef>

#ifdef SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef SIMT_TSAN
#include <sanitizer/tsan_interface.h>
#endif

namespace simt {

struct SanitizedFiber {
#ifdef SIMT_ASAN
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
#endif
#ifdef SIMT_TSAN
  void* tsan = nullptr;
#endif

  // A fiber with a stack of its own, about to start.
  void start([[maybe_unused]] char* bottom, [[maybe_unused]] size_t bytes) {
#ifdef SIMT_ASAN
    stack = bottom;
    stack_bytes = bytes;
    fake_stack = nullptr;
    __asan_unpoison_memory_region(bottom, bytes);
#endif
#ifdef SIMT_TSAN
    if (!tsan) tsan = __tsan_create_fiber(0);
#endif
  }

  // The fiber of a thread of the operating system.
  void adopt_thread() {
#ifdef SIMT_TSAN
    tsan = __tsan_get_current_fiber();
#endif
  }

  void before_switch_to([[maybe_unused]] SanitizedFiber& next, [[maybe_unused]] bool for_good) {
#ifdef SIMT_ASAN
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack, next.stack, next.stack_bytes);
#endif
#ifdef SIMT_TSAN
    __tsan_switch_to_fiber(next.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  }

  // First thing on this fiber after `from` switched to it.
  void after_switch([[maybe_unused]] SanitizedFiber& from) {
#ifdef SIMT_ASAN
    __sanitizer_finish_switch_fiber(fake_stack, &from.stack, &from.stack_bytes);
#endif
  }
};

// What is done before release(sync) happens before what is done after a later acquire(sync).
inline void release([[maybe_unused]] void* sync) {
#ifdef SIMT_TSAN
  __tsan_release(sync);
#endif
}

inline void acquire([[maybe_unused]] void* sync) {
#ifdef SIMT_TSAN
  __tsan_acquire(sync);
#endif
}

}  // namespace simt
