// One time step of a run of neighbouring channels: the innermost loops, chosen by gate, candidate and dtype.
//
// rows.cpp is compiled once for each instruction set; the processor decides at load time which copy serves.
#pragma once

#include <cstdint>

namespace minrnn {

enum Gate : int { kIdentity, kMinGRU, kMinLSTM, kMinLSTMUnnormalised, kNumGates };
enum Candidate : int { kPositive, kLinear, kTanh, kNumCandidates };

// Bits without arithmetic. Enumerations, because the compiler does not vectorise loops over arrays of structs.
enum class bfloat16 : uint16_t {};
enum class float16 : uint16_t {};

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

// The order in which a row's channels are worked through: that of memory, or its reverse. Processors fetch ahead only
// where all accesses go one way: rows that come in falling order are read twice as fast if their channels fall as well.
enum class Order { kRising, kFalling };

// pre: pre-activations (the third only for gates that have three). carry: the state (forward) or its adjoint
// (backward), updated in place. decay: the running product of a. n: channels. No two arrays overlap.
template <class IO> struct RowKernels {
    using Real = typename Computed<IO>::Real;
    using Carry = CarryRow<Real>;
    using Pre = const IO *const[3];
    using Gradients = IO *const[3];
    void (*forward)(Order order, int64_t n, const Pre &pre, Carry carry, IO *h);
    void (*forward_prefix)(Order order, int64_t n, const Pre &pre, Carry carry, Carry decay);
    void (*backward)(Order order, int64_t n, const Pre &pre, const IO *h_prev, const IO *dh, Carry carry,
                     const Gradients &dpre);
    void (*backward_prefix)(Order order, int64_t n, const Pre &pre, const IO *dh, Carry carry, Carry decay);
    void (*round)(int64_t n, const Real *from, IO *to);
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

namespace baseline { extern const RowTable rows; }
#ifdef MINRNN_X86
namespace avx2 { extern const RowTable rows; }
namespace avx512 { extern const RowTable rows; }
#endif

}  // namespace minrnn
