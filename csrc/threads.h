// Threads: those of the OpenMP runtime that torch has loaded.
//
// `#pragma omp` would become calls of the compiler's own runtime (GCC's libgomp, Clang's libomp, MSVC's vcomp), which
// need not be torch's. Of two runtimes in a process each keeps a pool, and one's threads wait for cores on which the
// other's spin. So nothing is linked, and the functions behind the pragma are looked up among the libraries of the
// process when the extension is loaded, after torch. Where there are none, one thread does the work.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace minrnn {

// Calls body(argument, thread, team) on at most `threads` threads, this one among them; `thread` counts from 0, `team`
// is how many there are. Nothing may be thrown.
void in_parallel(int threads, void (*body)(void *, int thread, int team), void *argument);

// The function that starts them, or "" where the process has no OpenMP runtime.
const char *threads_by();

// Calls job(i, thread) for each i below `jobs`; whoever is free takes the next.
template <class Job> void for_each(int64_t jobs, int threads, Job &&job) {
    if (threads <= 1 || jobs <= 1) {
        for (int64_t i = 0; i < jobs; ++i) job(i, 0);
        return;
    }
    struct Call {
        Job &job;
        int64_t jobs;
        std::atomic<int64_t> next;
    } call{job, jobs, {0}};
    const auto work = [](void *argument, int thread, int) noexcept {
        Call &call = *static_cast<Call *>(argument);
        for (int64_t i = call.next++; i < call.jobs; i = call.next++) call.job(i, thread);
    };
    in_parallel(static_cast<int>(std::min<int64_t>(threads, jobs)), work, &call);
}

// The same in equal shares, of which each thread takes one, the same at every call: what it reads stays in its cache.
template <class Job> void for_shares(int64_t jobs, int threads, Job &&job) {
    struct Call {
        Job &job;
        int64_t jobs;
    } call{job, jobs};
    const auto work = [](void *argument, int thread, int team) noexcept {
        Call &call = *static_cast<Call *>(argument);
        const int64_t end = call.jobs * (thread + 1) / team;
        for (int64_t i = call.jobs * thread / team; i < end; ++i) call.job(i);
    };
    in_parallel(static_cast<int>(std::min<int64_t>(threads, jobs)), work, &call);
}

}  // namespace minrnn
