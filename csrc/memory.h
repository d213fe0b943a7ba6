// Memory for large outputs, kept for the next one.
//
// A system allocator hands large blocks back to the operating system when they are freed, so that every training step
// gets fresh pages and waits while the kernel clears them: for an output of 64 MiB as long as for the scan itself. Here
// a block that is given back serves the next request of about its size, as in torch's allocator for CUDA. Blocks that
// nobody asked for within kIdle go back to the system when the next one is taken or given.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <mutex>
#include <new>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace minrnn {

struct Span {
    void *data;
    std::size_t capacity;  // bytes
};

class Recycler {
    using Clock = std::chrono::steady_clock;
    static constexpr std::chrono::seconds kIdle{10};
    static constexpr std::align_val_t kPage{std::size_t(2) << 20};

    struct Idle {
        Span span;
        Clock::time_point since;
    };

    std::mutex mutex;
    std::vector<Idle> idle;  // oldest first

    static Span allocate(std::size_t bytes) {
        const std::size_t page = static_cast<std::size_t>(kPage), capacity = (bytes + page - 1) / page * page;
        void *data = ::operator new(capacity, kPage);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
        madvise(data, capacity, MADV_HUGEPAGE);  // where the system refuses, only speed is lost
#endif
        return {data, capacity};
    }

    void drop_old() {
        const auto now = Clock::now();
        const auto young = std::find_if(idle.begin(), idle.end(), [&](const Idle &x) { return now - x.since < kIdle; });
        for (auto x = idle.begin(); x != young; ++x) ::operator delete(x->span.data, kPage);
        idle.erase(idle.begin(), young);
    }

  public:
    Span take(std::size_t bytes) {
        const std::lock_guard<std::mutex> lock(mutex);
        drop_old();
        auto best = idle.end();
        for (auto x = idle.begin(); x != idle.end(); ++x)
            if (x->span.capacity >= bytes && x->span.capacity - bytes <= std::max(bytes / 4, std::size_t(2) << 20) &&
                (best == idle.end() || x->span.capacity <= best->span.capacity))
                best = x;  // of equal blocks the last one given back, which may still be in a cache
        if (best == idle.end()) return allocate(bytes);
        const Span span = best->span;
        idle.erase(best);
        return span;
    }

    void give(Span span) {
        const std::lock_guard<std::mutex> lock(mutex);
        drop_old();
        idle.push_back({span, Clock::now()});
    }

    // Everything idle, at once. Returns the bytes.
    std::size_t release() {
        const std::lock_guard<std::mutex> lock(mutex);
        std::size_t bytes = 0;
        for (const Idle &x : idle) {
            bytes += x.span.capacity;
            ::operator delete(x.span.data, kPage);
        }
        idle.clear();
        return bytes;
    }
};

}  // namespace minrnn
