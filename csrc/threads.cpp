// The interfaces between compilers and OpenMP runtimes: libgomp's, which LLVM's and Intel's runtimes have on Linux too,
// and LLVM's, which is Intel's. Compiled programs depend on them, so they do not change.
//   https://gcc.gnu.org/onlinedocs/libgomp/The-libgomp-ABI.html
//   https://openmp.llvm.org/doxygen/group__PARALLEL.html
#include "threads.h"

#ifdef _WIN32
#define NOMINMAX
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace minrnn {
namespace {

// What torch itself would call; nothing is loaded.
void *symbol(const char *name) {
#ifdef _WIN32
    for (const char *library : {"libiomp5md.dll", "libomp140.x86_64.dll", "libomp.dll"})
        if (const HMODULE loaded = GetModuleHandleA(library))
            return reinterpret_cast<void *>(GetProcAddress(loaded, name));
    return nullptr;
#else
    // What was preloaded serves torch too. A torch for the CPU offers its libgomp to all, a torch for CUDA does not:
    // there it is found among the libraries that torch's own is linked with.
    if (void *found = dlsym(RTLD_DEFAULT, name)) return found;
    void *torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch ? dlsym(torch, name) : nullptr;
#endif
}

template <class F> void find(F *&function, const char *name) { function = reinterpret_cast<F *>(symbol(name)); }

struct Place {  // LLVM's ident_t: where in the source a region begins
    int32_t reserved_1, flags, reserved_2, reserved_3;
    const char *source;
};
Place place{0, 2, 0, 0, ";minrnn;in_parallel;0;0;;"};

using Microtask = void(int32_t *, int32_t *, ...);

struct Runtime {
    void (*gomp)(void (*)(void *), void *, unsigned threads, unsigned flags);
    void (*fork)(Place *, int32_t arguments, Microtask *, ...);
    void (*push)(Place *, int32_t thread, int32_t threads);
    int32_t (*global)(Place *);
    int (*thread)();
    int (*team)();

    Runtime() {
        find(gomp, "GOMP_parallel");
        find(fork, "__kmpc_fork_call");
        find(push, "__kmpc_push_num_threads");
        find(global, "__kmpc_global_thread_num");
        find(thread, "omp_get_thread_num");
        find(team, "omp_get_num_threads");
    }
    const char *name() const {
        if (!thread || !team) return "";
        if (gomp) return "GOMP_parallel";
        return fork && push && global ? "__kmpc_fork_call" : "";
    }

    static const Runtime &get() {
        static const Runtime found;
        return found;
    }
};

struct Region {
    void (*body)(void *, int, int);
    void *argument;
    const Runtime &runtime;
    void run() const { body(argument, runtime.thread(), runtime.team()); }
};

void run_region(void *region) { static_cast<const Region *>(region)->run(); }
void run_microtask(int32_t *, int32_t *, void *region) { run_region(region); }

}  // namespace

void in_parallel(int threads, void (*body)(void *, int, int), void *argument) {
    const Runtime &runtime = Runtime::get();
    if (threads <= 1 || !*runtime.name()) return body(argument, 0, 1);
    Region region{body, argument, runtime};
    if (runtime.gomp) return runtime.gomp(run_region, &region, static_cast<unsigned>(threads), 0);
    runtime.push(&place, runtime.global(&place), threads);
    runtime.fork(&place, 1, reinterpret_cast<Microtask *>(run_microtask), static_cast<void *>(&region));
}

const char *threads_by() { return Runtime::get().name(); }

}  // namespace minrnn
