#include "memory.h"

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <string_view>
#include <utility>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#define COSFACE_HAS_MMAP
#endif

namespace cosface {

void use_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(COSFACE_HAS_MMAP) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  if (bytes < kManyBytes) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

#if defined(COSFACE_HAS_MMAP)

namespace {

struct Block {
  void* data = nullptr;
  size_t bytes = 0;
};

// Never destroyed: a gradient may be freed while the process ends.
std::mutex& lock = *new std::mutex;
Block kept;

}  // namespace

void* take_pages(size_t bytes) {
  const char* reuse = std::getenv("COSFACE_REUSE_GRADIENT");
  if (reuse != nullptr && std::string_view(reuse) == "0") return nullptr;
  {
    std::lock_guard guard(lock);
    if (kept.data != nullptr && kept.bytes == bytes) return std::exchange(kept, {}).data;
  }
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return nullptr;
  use_huge_pages(data, bytes);
  return data;
}

void give_pages(void* data, size_t bytes) {
#if defined(MADV_FREE)
  madvise(data, bytes, MADV_FREE);
#endif
  Block before{data, bytes};
  {
    std::lock_guard guard(lock);
    std::swap(kept, before);
  }
  if (before.data != nullptr) munmap(before.data, before.bytes);
}

#else

void* take_pages(size_t) { return nullptr; }
void give_pages(void*, size_t) {}

#endif

}  // namespace cosface
