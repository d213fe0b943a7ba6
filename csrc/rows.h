// One time step of a run of neighbouring channels: the innermost loops, chosen by gate, candidate and dtype.
//
// rows.cpp is compiled once for each instruction set; the processor decides at load time which copy serves.
#pragma once

#include <cstdint>

namespace minrnn {

enum Gate : int { kIdentity, kMinGRU, kMinLSTM, kMinLSTMUnnormalised, kNumGates };
enum Candidate : int { kPositive, kLinear, kTanh, kNumCandidates };

// p0, p1, p2: pre-activations (p2 only for gates that have three). carry: the state (forward) or its adjoint
// (backward), updated in place. decay: the running product of a. n: channels. No two arrays overlap.
template <class Real> struct RowKernels {
    void (*forward)(int64_t n, const Real *p0, const Real *p1, const Real *p2, double *carry, Real *h);
    void (*forward_prefix)(int64_t n, const Real *p0, const Real *p1, const Real *p2, double *carry,
                           double *decay);
    void (*backward)(int64_t n, const Real *p0, const Real *p1, const Real *p2, const Real *h_prev,
                     const Real *dh, double *carry, Real *d0, Real *d1, Real *d2);
    void (*backward_prefix)(int64_t n, const Real *p0, const Real *p1, const Real *p2, const Real *dh,
                            double *carry, double *decay);
};

struct RowTable {
    RowKernels<float> single[kNumGates][kNumCandidates];
    RowKernels<double> full[kNumGates][kNumCandidates];
    void (*widen_bfloat16)(int64_t n, const uint16_t *from, float *to);
    void (*narrow_bfloat16)(int64_t n, const float *from, uint16_t *to);
    void (*widen_float16)(int64_t n, const uint16_t *from, float *to);
    void (*narrow_float16)(int64_t n, const float *from, uint16_t *to);
};

namespace baseline { extern const RowTable rows; }
#ifdef MINRNN_X86
namespace avx2 { extern const RowTable rows; }
namespace avx512 { extern const RowTable rows; }
#endif

}  // namespace minrnn
