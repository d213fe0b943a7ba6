// Vectors of neighboring channels: as many lanes as one register of the instruction set holds.
//
// The vector types are the compiler's own (GCC and Clang), so arithmetic, comparisons and `mask ? a : b` work lane by
// lane on every processor. Intrinsics are used only where the compiler generates poor code.
#pragma once

#include <cstdint>
#include <cstring>

#include "rows.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define MINRNN_INLINE inline __attribute__((always_inline))

namespace minrnn {
namespace {  // internal linkage: each instruction set compiles its own copy, and the linker must not merge them

#if defined(__AVX512F__)
constexpr int kRegister = 64;  // bytes
#elif defined(__AVX2__)
constexpr int kRegister = 32;
#else
constexpr int kRegister = 16;
#endif

using Floats = float __attribute__((vector_size(kRegister)));
using Doubles = double __attribute__((vector_size(kRegister)));

template <class Real> struct LanesOf;
template <> struct LanesOf<float> {
    using V = Floats;
};
template <> struct LanesOf<double> {
    using V = Doubles;
};
template <class Real> using Lanes = typename LanesOf<Real>::V;

template <class V> struct Traits;
template <> struct Traits<Floats> {
    using Real = float;
    using Int = int32_t;
    using Bits = int32_t __attribute__((vector_size(kRegister)));
    using Halves = uint16_t __attribute__((vector_size(kRegister / 2)));
};
template <> struct Traits<Doubles> {
    using Real = double;
    using Int = int64_t;
    using Bits = int64_t __attribute__((vector_size(kRegister)));
};
template <class V> using RealOf = typename Traits<V>::Real;
template <class V> using BitsOf = typename Traits<V>::Bits;
template <class V> constexpr int kLanes = sizeof(V) / sizeof(RealOf<V>);

template <class V> MINRNN_INLINE V splat(RealOf<V> x) { return x - V{}; }

template <class V> constexpr typename Traits<V>::Int kSign = typename Traits<V>::Int(1) << (8 * sizeof(RealOf<V>) - 1);

template <class V> MINRNN_INLINE V absolute(V x) { return (V)((BitsOf<V>)x & ~kSign<V>); }
template <class V> MINRNN_INLINE V minus_absolute(V x) { return (V)((BitsOf<V>)x | kSign<V>); }
template <class V> MINRNN_INLINE BitsOf<V> has_sign(V x) { return (BitsOf<V>)x < 0; }
// -x where the other number has its sign bit set, else x.
template <class V> MINRNN_INLINE V flip_sign(V x, V where) { return (V)((BitsOf<V>)x ^ ((BitsOf<V>)where & kSign<V>)); }

// max(x, bound), and NaN where x is NaN.
template <class V> MINRNN_INLINE V at_least(V x, RealOf<V> bound) { return x < bound ? splat<V>(bound) : x; }

// 1 / x, to one unit in the last place, for x and 1 / x that are normal numbers.
template <class V> MINRNN_INLINE V reciprocal(V x) { return 1 / x; }

#if defined(__AVX512F__)
// The instruction returns its second operand when either is NaN.
template <> MINRNN_INLINE Floats at_least(Floats x, float bound) {
    return (Floats)_mm512_max_ps(_mm512_set1_ps(bound), (__m512)x);
}
// An estimate of 14 bits and one Newton step: a third of a division's cost.
template <> MINRNN_INLINE Floats reciprocal(Floats x) {
    const Floats estimate = (Floats)_mm512_rcp14_ps((__m512)x);
    return estimate + estimate * (1 - x * estimate);
}
#elif defined(__AVX2__)
template <> MINRNN_INLINE Floats at_least(Floats x, float bound) {
    return (Floats)_mm256_max_ps(_mm256_set1_ps(bound), (__m256)x);
}
#endif

// ---------------------------------------------------------------------------------------------------------
// Loads and stores, with conversion between the dtype in memory and the type that is computed with.

template <class To, class From> MINRNN_INLINE To load_bytes(const From *from) {
    To to;
    std::memcpy(&to, from, sizeof to);
    return to;
}

template <class From> MINRNN_INLINE void store_bytes(From x, void *to) { std::memcpy(to, &x, sizeof x); }

MINRNN_INLINE Floats load(const float *from) { return load_bytes<Floats>(from); }
MINRNN_INLINE Doubles load(const double *from) { return load_bytes<Doubles>(from); }
MINRNN_INLINE void store(Floats x, float *to) { store_bytes(x, to); }
MINRNN_INLINE void store(Doubles x, double *to) { store_bytes(x, to); }

using Halves = Traits<Floats>::Halves;
using Words = uint32_t __attribute__((vector_size(kRegister)));

// 16-bit numbers, each in a word of its own, and back.
#if defined(__AVX512F__)
MINRNN_INLINE Words words(const void *from) { return (Words)_mm512_cvtepu16_epi32(load_bytes<__m256i>(from)); }
MINRNN_INLINE Halves halves(Words x) { return (Halves)_mm512_cvtepi32_epi16((__m512i)x); }
#elif defined(__AVX2__)
MINRNN_INLINE Words words(const void *from) { return (Words)_mm256_cvtepu16_epi32(load_bytes<__m128i>(from)); }
MINRNN_INLINE Halves halves(Words x) {
    const __m256i packed = _mm256_packus_epi32((__m256i)x, (__m256i)x);  // within each half of the register
    return (Halves)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
#else
MINRNN_INLINE Words words(const void *from) { return __builtin_convertvector(load_bytes<Halves>(from), Words); }
MINRNN_INLINE Halves halves(Words x) { return __builtin_convertvector(x, Halves); }
#endif

// bfloat16 is the upper half of a float.
MINRNN_INLINE Floats load(const bfloat16 *from) { return (Floats)(words(from) << 16); }

#if defined(__AVX512BF16__)
// One instruction; numbers below 1.2e-38 become zero.
MINRNN_INLINE void store(Floats x, bfloat16 *to) { store_bytes(_mm512_cvtneps_pbh((__m512)x), to); }
#elif defined(__AVX512F__)
MINRNN_INLINE void store(Floats x, bfloat16 *to) {
    const __m512i bits = (__m512i)x, one = _mm512_set1_epi32(1);
    __m512i sum = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    sum = _mm512_mask_add_epi32(sum, _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000)), sum, one);
    const __mmask16 nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
    sum = _mm512_mask_or_epi32(sum, nan, bits, _mm512_set1_epi32(0x400000));
    const __m512i odd = _mm512_set_epi32(0x001f001d, 0x001b0019, 0x00170015, 0x00130011, 0x000f000d, 0x000b0009,
                                         0x00070005, 0x00030001, 0x001f001d, 0x001b0019, 0x00170015, 0x00130011,
                                         0x000f000d, 0x000b0009, 0x00070005, 0x00030001);
    store_bytes(_mm512_castsi512_si256(_mm512_permutexvar_epi16(odd, sum)), to);
}
#else
// Rounds to nearest, ties to even.
MINRNN_INLINE void store(Floats x, bfloat16 *to) {
    const Words bits = (Words)x;
    const Words nearest_even = bits + 0x7fffu + ((bits >> 16) & 1u);
    const Words quiet_nan = bits | 0x400000u;  // rounding up a NaN could make it an infinity
    store_bytes(halves(((Words)(x != x) ? quiet_nan : nearest_even) >> 16), to);
}
#endif

#if defined(__AVX512F__)
MINRNN_INLINE Floats load(const float16 *from) { return (Floats)_mm512_cvtph_ps(load_bytes<__m256i>(from)); }
MINRNN_INLINE void store(Floats x, float16 *to) {
    store_bytes(_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), to);
}
#elif defined(__F16C__)
MINRNN_INLINE Floats load(const float16 *from) { return (Floats)_mm256_cvtph_ps(load_bytes<__m128i>(from)); }
MINRNN_INLINE void store(Floats x, float16 *to) {
    store_bytes(_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), to);
}
#else
// float16 by hand: the exponent is rebased by a multiplication, which also handles subnormal numbers exactly.
MINRNN_INLINE Floats load(const float16 *from) {
    const float rebase = __builtin_bit_cast(float, static_cast<uint32_t>(127 + 127 - 15) << 23);  // 2^112
    const Words bits = words(from), magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
    const Words finite = (Words)((Floats)magnitude * rebase);
    const Words special = magnitude | 0x7f800000u;  // infinity and NaN keep their mantissa
    return (Floats)(sign | ((Words)(magnitude >= 0x0f800000u) ? special : finite));
}

MINRNN_INLINE void store(Floats x, float16 *to) {
    const Words bits = (Words)x, magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
    // Normal range: rebase the exponent, round the 13 dropped bits to nearest even.
    const Words normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14: adding 0.5 makes the float unit round at the subnormals' spacing, 2^-24.
    const Words subnormal = (Words)((Floats)magnitude + 0.5f) - (126u << 23);
    const Words rounded = (Words)(magnitude < (113u << 23)) ? subnormal : normal;
    const Words infinity = Words{} + 0x7c00u, nan = Words{} + 0x7e00u;
    const Words large = (Words)(magnitude > 0x7f800000u) ? nan : infinity;
    // 65520 and above
    store_bytes(halves(sign | ((Words)(magnitude >= 0x477ff000u) ? large : rounded)), to);
}
#endif

// A register's lanes, or the first n of them: the others are read as zero and not written.
struct All {};

template <class IO> MINRNN_INLINE auto load(const IO *from, All) { return load(from); }
template <class V, class IO> MINRNN_INLINE void store(V x, IO *to, All) { store(x, to); }

template <class IO> MINRNN_INLINE auto load(const IO *from, int64_t n) {
    IO buffer[kRegister / sizeof(typename Computed<IO>::Real)] = {};
    std::memcpy(buffer, from, n * sizeof(IO));
    return load(buffer);
}
template <class V, class IO> MINRNN_INLINE void store(V x, IO *to, int64_t n) {
    IO buffer[kLanes<V>];
    store(x, buffer);
    std::memcpy(to, buffer, n * sizeof(IO));
}

}  // namespace
}  // namespace minrnn
