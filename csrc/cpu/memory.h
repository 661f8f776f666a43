// Pages for buffers of gigabytes, which are expensive to touch for the first time: the system zeroes them, and a
// virtual machine may have to fetch them from its host. On one such machine 2 GiB took 0.15 to 4 s, and the whole
// step of a million classes 3.6 s.
#pragma once

#include <cstddef>

namespace cosface {

// A buffer below this is faulted in within milliseconds and is left to the allocator.
constexpr size_t kManyBytes = size_t{32} << 20;

// Asks for huge pages under memory that has not been touched yet: a thousand page faults for 2 GiB instead of half
// a million. A request that the system refuses is no error.
void use_huge_pages(void* data, size_t bytes);

// Uninitialised memory on huge pages; null if there is none, or if COSFACE_REUSE_GRADIENT is 0. The last block
// that was given back is handed out again if it has the size asked for: a training step frees its gradient and
// asks for the same one a moment later.
void* take_pages(size_t bytes);

// Keeps one block for the next take_pages, marked so that the system may take its pages when memory is short, and
// returns the one kept before.
void give_pages(void* data, size_t bytes);

}  // namespace cosface
