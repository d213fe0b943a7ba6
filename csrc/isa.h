// The instruction sets that kernels are compiled for, and the choice among them when the extension is loaded.
#pragma once

namespace minrnn {

#ifdef MINRNN_X86
#define MINRNN_FOR_EACH_ISA(declare) declare(baseline) declare(avx2) declare(avx512)
#else
#define MINRNN_FOR_EACH_ISA(declare) declare(baseline)
#endif

enum class Isa { baseline, avx2, avx512 };

// The widest one that this processor has.
inline Isa detect_isa() {
#ifdef MINRNN_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        return Isa::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
    return Isa::baseline;
}

}  // namespace minrnn
