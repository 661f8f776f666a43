#pragma once

#include <cstddef>

namespace cosface {

// Asks for huge pages under freshly allocated memory, before its first use. Touching 2 GiB for the first time
// takes half a million page faults of 4 KiB, or a thousand of 2 MiB. A request that the system refuses is no
// error.
void use_huge_pages(void* data, size_t bytes);

}  // namespace cosface
