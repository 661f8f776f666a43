// Pages: a request for huge ones changes no byte, and a block that is given back is handed out again.
#include <cstdint>
#include <cstring>

#include "check.h"
#include "cpu/memory.h"

namespace cosface::test {
namespace {

// One block is kept, and serves a request of its own size only; blocks in use are distinct.
void blocks() {
  constexpr size_t kBytes = size_t{1} << 20;
  void *first = take_pages(kBytes), *second = take_pages(kBytes);
  CHECK(first != nullptr && second != nullptr && first != second, first, second);
  std::memset(first, 1, kBytes);
  std::memset(second, 2, kBytes);
  give_pages(first, kBytes);
  give_pages(second, kBytes);  // first goes back to the system
  void* other = take_pages(2 * kBytes);
  CHECK(other != second, other, second);
  void* again = take_pages(kBytes);
  CHECK(again == second, again, second);
  std::memset(again, 3, kBytes);
  give_pages(again, kBytes);
  give_pages(other, 2 * kBytes);
}

void tests() {
  constexpr int64_t kMiB = 1 << 20;
  use_huge_pages(nullptr, 0);
  blocks();
  for (int64_t bytes : {int64_t{0}, int64_t{1}, 35 * kMiB + 7}) {
    for (int64_t offset : {0, 4097}) {
      if (offset > bytes) continue;
      Exact<uint8_t> buffer(bytes, 0x5a);
      use_huge_pages(buffer + offset, bytes - offset);
      const int64_t kept = std::count(buffer.begin(), buffer.end(), 0x5a);
      CHECK(kept == bytes, bytes, offset, kept);
    }
  }
}

}  // namespace
}  // namespace cosface::test

int main() { return cosface::test::run(cosface::test::tests); }
