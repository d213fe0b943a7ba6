// The instruction sets that kernels are compiled for, and the choice among them when the extension is loaded.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <initializer_list>
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

#ifdef MINRNN_X86
// What the CPUID instruction says (Intel SDM, volume 2A). The compilers' own function for this, __builtin_cpu_supports,
// needs a library that clang-cl does not link.
struct Cpuid {
    uint32_t a, b, c, d;
    Cpuid(uint32_t leaf, uint32_t subleaf) : a(leaf), b(0), c(subleaf), d(0) {
        __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    }
};

constexpr bool has(uint32_t bits, std::initializer_list<int> wanted) {
    for (int bit : wanted)
        if (!(bits >> bit & 1)) return false;
    return true;
}

// Which registers the operating system saves: bits 1 and 2 for AVX, and 5 to 7 for AVX-512.
inline uint32_t saved_registers() {
    if (!has(Cpuid(1, 0).c, {27})) return 0;
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}
#endif

// The widest one that this processor has.
inline Isa detect_isa() {
#ifdef MINRNN_X86
    if (Cpuid(0, 0).a < 7) return Isa::baseline;
    const Cpuid basic(1, 0), extended(7, 0);
    const uint32_t saved = saved_registers();
    constexpr int fma = 12, f16c = 29, avx2 = 5, avx512f = 16, avx512dq = 17, avx512bw = 30, avx512vl = 31, bf16 = 5;
    if (!has(saved, {1, 2}) || !has(basic.c, {fma, f16c}) || !has(extended.b, {avx2})) return Isa::baseline;
    if (!has(saved, {5, 6, 7}) || !has(extended.b, {avx512f, avx512dq, avx512bw, avx512vl})) return Isa::avx2;
    return extended.a >= 1 && has(Cpuid(7, 1).a, {bf16}) ? Isa::avx512_bf16 : Isa::avx512;
#else
    return Isa::baseline;
#endif
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
