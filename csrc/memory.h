// Huge pages for large outputs.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace minrnn {

// Pages of 2 MiB, where `bytes` from `address` on hold whole ones: fewer faults when they are first written, and fewer
// TLB misses later. Where the system refuses, only speed is lost.
inline void prefer_huge_pages([[maybe_unused]] std::uintptr_t address, [[maybe_unused]] std::uintptr_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t page = std::uintptr_t(2) << 20;
    const std::uintptr_t first = (address + page - 1) / page * page, last = (address + bytes) / page * page;
    if (first < last) madvise(reinterpret_cast<void *>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace minrnn
