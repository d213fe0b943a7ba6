// One time step of a run of neighbouring channels: the innermost loops, chosen by gate, candidate and dtype.
//
// rows.cpp is compiled once for each instruction set; the processor decides at load time which copy serves.
#pragma once

#include <cstdint>

#include "isa.h"

namespace minrnn {

enum Gate : int { kIdentity, kMinGRU, kMinLSTM, kMinLSTMUnnormalised, kMinGRUSigned, kMinLSTMSigned, kNumGates };
enum Candidate : int { kPositive, kLinear, kTanh, kNumCandidates };

// Bits without arithmetic. Enumerations, because the compiler does not vectorise loops over arrays of structs.
enum class bfloat16 : uint16_t {};
enum class float16 : uint16_t {};

inline float widened(float x) { return x; }
inline double widened(double x) { return x; }
inline float widened(bfloat16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x) << 16); }
inline float widened(float16 x) {  // the exponent is rebased by a multiplication, exact for subnormal numbers too
    const uint32_t magnitude = (static_cast<uint32_t>(x) & 0x7fffu) << 13, sign = (static_cast<uint32_t>(x) >> 15) << 31;
    const uint32_t finite = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude) * 0x1p112f);
    return __builtin_bit_cast(float, sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite));
}

// The type in which an input type's gates and states are computed.
template <class IO> struct Computed {
    using Real = float;
};
template <> struct Computed<double> {
    using Real = double;
};

// States of a row of channels, each an unevaluated sum hi + lo (see Carry in gates.h; lo stays zero in double).
template <class Real> struct CarryRow {
    Real *hi, *lo;
};

// Rows of channels, one a step, in the order in which the recurrence meets them: memory's, or its reverse where stride
// is negative. Then the channels fall as well: processors fetch ahead only where all accesses go one way, and rows that
// come in falling order with rising channels are read at half the speed.
template <class X> struct Rows {
    X *first;
    int64_t stride;  // elements from one step's row to the next one's
};

// n channels, steps rows. pre: pre-activations (the third only for gates that have three). carry: the state (forward)
// or its adjoint (backward), updated in place. decay: the running product of a. No two arrays overlap.
template <class IO> struct RowKernels {
    using Real = typename Computed<IO>::Real;
    using Carry = CarryRow<Real>;
    using Pre = Rows<const IO>[3];
    using Gradients = Rows<IO>[3];
    void (*forward)(int64_t n, int64_t steps, const Pre &pre, Carry carry, Rows<IO> h);
    void (*forward_prefix)(int64_t n, int64_t steps, const Pre &pre, Carry carry, Carry decay);
    void (*backward)(int64_t n, int64_t steps, const Pre &pre, Rows<const IO> h_prev, Rows<const IO> dh, Carry carry,
                     const Gradients &dpre);
    void (*backward_prefix)(int64_t n, int64_t steps, const Pre &pre, Rows<const IO> dh, Carry carry, Carry decay);
    void (*round)(int64_t n, const Real *from, IO *to);
    bool (*finite)(int64_t n, const Real *row);  // whether all numbers of a row are
};

struct RowTable {
    RowKernels<float> single[kNumGates][kNumCandidates];
    RowKernels<double> full[kNumGates][kNumCandidates];
    RowKernels<bfloat16> brain[kNumGates][kNumCandidates];
    RowKernels<float16> half[kNumGates][kNumCandidates];

    const RowKernels<float> &of(int gate, int candidate, float) const { return single[gate][candidate]; }
    const RowKernels<double> &of(int gate, int candidate, double) const { return full[gate][candidate]; }
    const RowKernels<bfloat16> &of(int gate, int candidate, bfloat16) const { return brain[gate][candidate]; }
    const RowKernels<float16> &of(int gate, int candidate, float16) const { return half[gate][candidate]; }
};

#define MINRNN_DECLARE_ROWS(isa) \
    namespace isa {              \
    extern const RowTable rows;  \
    }
MINRNN_FOR_EACH_ISA(MINRNN_DECLARE_ROWS)
#undef MINRNN_DECLARE_ROWS

}  // namespace minrnn
