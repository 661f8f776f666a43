// use_huge_pages is a request: it changes no byte, whatever the size and the place of the buffer.
#include <cstdint>

#include "check.h"
#include "cpu/memory.h"

namespace cosface::test {
namespace {

void tests() {
  constexpr int64_t kMiB = 1 << 20;
  use_huge_pages(nullptr, 0);
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
