// One time step of a run of neighboring channels: the innermost loops, chosen by gate, candidate and dtype.
//
// rows.cpp is compiled once for each instruction set; which copy is used is decided at load time, by the processor.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "isa.h"

namespace minrnn {

// Room for the gates, whose functors, names and codes are in gates.h.
constexpr int kMostGates = 16;

// The candidates: the functor in gates.h and the name in Python.
#define MINRNN_CANDIDATES(X) \
    X(Positive, "positive")  \
    X(Linear, "linear")      \
    X(Tanh, "tanh")

// The dtypes: the type and the name in torch.
#define MINRNN_DTYPES(X)      \
    X(float, "float32")       \
    X(double, "float64")      \
    X(bfloat16, "bfloat16")   \
    X(float16, "float16")

#define MINRNN_ENUMERATOR(name, ...) k##name,
#define MINRNN_NAME(type, name, ...) name,
enum Candidate : int { MINRNN_CANDIDATES(MINRNN_ENUMERATOR) kNumCandidates };
enum Dtype : int { MINRNN_DTYPES(MINRNN_ENUMERATOR) kNumDtypes };
constexpr const char *kCandidateNames[] = {MINRNN_CANDIDATES(MINRNN_NAME)};
constexpr const char *kDtypeNames[] = {MINRNN_DTYPES(MINRNN_NAME)};
#undef MINRNN_ENUMERATOR
#undef MINRNN_NAME

// Bits without arithmetic. Enumerations, because the compiler does not vectorize loops over arrays of structs.
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

// Rows of channels, one for each step, in the order of the recurrence: the order in memory, or its reverse where stride
// is negative. Then channels are read in reverse as well: hardware prefetching needs accesses in one direction, and
// rows in falling order with rising channels are read at half the speed.
template <class X> struct Rows {
    X *first;
    int64_t stride;  // elements from one step's row to the next
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
    bool (*finite)(int64_t n, const Real *row);  // whether all numbers of a row are finite
    int num_pre;                                 // pre-activations of the gate
};

// Selects kernels: indices into the lists of gates and candidates, and whether the decay is signed.
struct Mode {
    int gate, candidate;
    bool is_signed;
};

template <class IO> struct KernelSet {
    RowKernels<IO> kernels[kMostGates][kNumCandidates][2];  // last axis: signed; null where there is no such form
};

struct RowTable : KernelSet<float>, KernelSet<double>, KernelSet<bfloat16>, KernelSet<float16> {
    int num_gates;
    const char *gate_names[kMostGates];

    template <class IO> const RowKernels<IO> &of(Mode mode) const {
        if (mode.gate < 0 || mode.gate >= num_gates || mode.candidate < 0 || mode.candidate >= kNumCandidates)
            throw std::invalid_argument("minrnn: no gate " + std::to_string(mode.gate) + " with candidate " +
                                        std::to_string(mode.candidate));
        const RowKernels<IO> &found = KernelSet<IO>::kernels[mode.gate][mode.candidate][mode.is_signed];
        if (!found.forward)
            throw std::invalid_argument(std::string("minrnn: gate '") + gate_names[mode.gate] + "' has no signed form");
        return found;
    }
};

MINRNN_KERNELS(RowTable, rows)

}  // namespace minrnn
