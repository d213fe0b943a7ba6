// The instruction sets that kernels are compiled for, and the choice among them when the extension is loaded.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace minrnn {

// From the narrowest to the widest.
#ifdef MINRNN_X86
#define MINRNN_FOR_EACH_ISA(X, ...) \
    X(baseline, __VA_ARGS__) X(avx2, __VA_ARGS__) X(avx512, __VA_ARGS__) X(avx512_bf16, __VA_ARGS__)
#else
#define MINRNN_FOR_EACH_ISA(X, ...) X(baseline, __VA_ARGS__)
#endif

#define MINRNN_ENUMERATOR(isa, ...) isa,
enum class Isa { MINRNN_FOR_EACH_ISA(MINRNN_ENUMERATOR) };
#undef MINRNN_ENUMERATOR

#define MINRNN_NAME(isa, ...) #isa,
constexpr const char *kIsaNames[] = {MINRNN_FOR_EACH_ISA(MINRNN_NAME)};
#undef MINRNN_NAME

// MINRNN_KERNELS(Type, name) declares a table of kernels. Its source file is compiled once for each instruction set and
// defines MINRNN_ISA::name; name_of(isa) returns the one of that instruction set.
#define MINRNN_DECLARE_KERNELS(isa, Type, name) \
    namespace isa {                             \
    extern const Type name;                     \
    }
#define MINRNN_ADDRESS_OF_KERNELS(isa, name) &isa::name,
#define MINRNN_KERNELS(Type, name)                                                                   \
    MINRNN_FOR_EACH_ISA(MINRNN_DECLARE_KERNELS, Type, name)                                          \
    inline const Type &name##_of(Isa isa) {                                                          \
        constexpr const Type *tables[] = {MINRNN_FOR_EACH_ISA(MINRNN_ADDRESS_OF_KERNELS, name)};     \
        return *tables[static_cast<int>(isa)];                                                       \
    }

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
    for (int isa = 0; isa <= static_cast<int>(widest); ++isa)
        if (std::string(name) == kIsaNames[isa]) return static_cast<Isa>(isa);
    throw std::runtime_error(std::string("MINRNN_ISA must name an instruction set that this processor has, up to ") +
                             kIsaNames[static_cast<int>(widest)] + ", got " + name);
}

}  // namespace minrnn
