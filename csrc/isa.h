// The instruction sets that kernels are compiled for, and the choice among them when the extension is loaded.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace minrnn {

#ifdef MINRNN_X86
#define MINRNN_FOR_EACH_ISA(declare) declare(baseline) declare(avx2) declare(avx512) declare(avx512_bf16)
#else
#define MINRNN_FOR_EACH_ISA(declare) declare(baseline)
#endif

enum class Isa { baseline, avx2, avx512, avx512_bf16 };
constexpr const char *kIsaNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

// The widest one that this processor has.
inline Isa detect_isa() {
#ifdef MINRNN_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return Isa::avx2;
#endif
    return Isa::baseline;
}

// The widest one, or the narrower one that MINRNN_ISA names: for tests, and to compare.
inline Isa choose_isa() {
    const Isa widest = detect_isa();
    const char *name = std::getenv("MINRNN_ISA");
    if (!name || !*name) return widest;
    for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16})
        if (isa <= widest && std::string(name) == kIsaNames[static_cast<int>(isa)]) return isa;
    throw std::runtime_error(std::string("MINRNN_ISA must name an instruction set that this processor has, up to ") +
                             kIsaNames[static_cast<int>(widest)] + ", got " + name);
}

}  // namespace minrnn
