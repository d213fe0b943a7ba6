// The innermost loops, compiled with -DMINRNN_ISA=<name> and that instruction set's flags.
#include "rows.h"

#include "gates.h"

namespace minrnn {
namespace {

template <class Real, class G> struct Rows {
    static void forward(int64_t n, const Real *__restrict p0, const Real *__restrict p1,
                        const Real *__restrict p2, double *__restrict carry, Real *__restrict h) {
        for (int64_t d = 0; d < n; ++d) {
            const Recurrence<Real> r = G::template forward<Real>(p0[d], p1[d], G::num_pre > 2 ? p2[d] : Real(0));
            const double next = r.a * carry[d] + static_cast<double>(r.b);
            carry[d] = next;
            h[d] = static_cast<Real>(next);
        }
    }

    static void forward_prefix(int64_t n, const Real *__restrict p0, const Real *__restrict p1,
                               const Real *__restrict p2, double *__restrict carry, double *__restrict decay) {
        for (int64_t d = 0; d < n; ++d) {
            const Recurrence<Real> r = G::template forward<Real>(p0[d], p1[d], G::num_pre > 2 ? p2[d] : Real(0));
            carry[d] = r.a * carry[d] + static_cast<double>(r.b);
            decay[d] *= r.a;
        }
    }

    static void backward(int64_t n, const Real *__restrict p0, const Real *__restrict p1,
                         const Real *__restrict p2, const Real *__restrict h_prev, const Real *__restrict dh,
                         double *__restrict carry, Real *__restrict d0, Real *__restrict d1,
                         Real *__restrict d2) {
        for (int64_t d = 0; d < n; ++d) {
            const double adjoint = static_cast<double>(dh[d]) + carry[d];
            Real g0, g1, g2 = 0;
            const double a = G::template backward<Real>(p0[d], p1[d], G::num_pre > 2 ? p2[d] : Real(0), h_prev[d],
                                                        static_cast<Real>(adjoint), g0, g1, g2);
            carry[d] = a * adjoint;
            d0[d] = g0;
            d1[d] = g1;
            if (G::num_pre > 2) d2[d] = g2;
        }
    }

    static void backward_prefix(int64_t n, const Real *__restrict p0, const Real *__restrict p1,
                                const Real *__restrict p2, const Real *__restrict dh, double *__restrict carry,
                                double *__restrict decay) {
        for (int64_t d = 0; d < n; ++d) {
            const double a = G::template forward<Real>(p0[d], p1[d], G::num_pre > 2 ? p2[d] : Real(0)).a;
            carry[d] = a * (static_cast<double>(dh[d]) + carry[d]);
            decay[d] *= a;
        }
    }

    static constexpr RowKernels<Real> kernels() { return {forward, forward_prefix, backward, backward_prefix}; }
};

// bfloat16 is the upper half of a float.
void widen_bfloat16(int64_t n, const uint16_t *__restrict from, float *__restrict to) {
    for (int64_t d = 0; d < n; ++d) to[d] = __builtin_bit_cast(float, static_cast<uint32_t>(from[d]) << 16);
}

void narrow_bfloat16(int64_t n, const float *__restrict from, uint16_t *__restrict to) {
    for (int64_t d = 0; d < n; ++d) {
        const uint32_t bits = __builtin_bit_cast(uint32_t, from[d]);
        const uint32_t nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        const uint32_t quiet_nan = (bits >> 16) | 0x40u;  // rounding up a NaN could make it an infinity
        to[d] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : nearest_even);
    }
}

// float16: the exponent is rebased by a multiplication, which also handles subnormal numbers exactly.
void widen_float16(int64_t n, const uint16_t *__restrict from, float *__restrict to) {
    const float rebase = __builtin_bit_cast(float, static_cast<uint32_t>(127 + 127 - 15) << 23);  // 2^112
    for (int64_t d = 0; d < n; ++d) {
        const uint32_t magnitude = static_cast<uint32_t>(from[d] & 0x7fffu) << 13;
        const uint32_t sign = static_cast<uint32_t>(from[d] & 0x8000u) << 16;
        const uint32_t finite = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude) * rebase);
        const uint32_t special = magnitude | 0x7f800000u;  // infinity and NaN keep their mantissa
        to[d] = __builtin_bit_cast(float, sign | (magnitude >= 0x0f800000u ? special : finite));
    }
}

void narrow_float16(int64_t n, const float *__restrict from, uint16_t *__restrict to) {
    const float half = __builtin_bit_cast(float, static_cast<uint32_t>(127 - 1) << 23);
    for (int64_t d = 0; d < n; ++d) {
        const uint32_t bits = __builtin_bit_cast(uint32_t, from[d]);
        const uint32_t magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
        // Normal range: rebase the exponent, round the 13 dropped bits to nearest even.
        const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
        // Below 2^-14: adding 0.5 makes the float unit round at the subnormals' spacing, 2^-24.
        const float shifted = __builtin_bit_cast(float, magnitude) + half;
        const uint32_t subnormal = __builtin_bit_cast(uint32_t, shifted) - (126u << 23);
        const uint32_t rounded = magnitude < (113u << 23) ? subnormal : normal;
        const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
        to[d] = static_cast<uint16_t>(sign | (magnitude >= 0x477ff000u ? large : rounded));  // 65520 and above
    }
}

template <class Real, template <template <class> class> class G, class Set>
constexpr void fill(Set &set, Gate gate) {
    set[gate][kPositive] = Rows<Real, G<Positive>>::kernels();
    set[gate][kLinear] = Rows<Real, G<Linear>>::kernels();
    set[gate][kTanh] = Rows<Real, G<Tanh>>::kernels();
}

template <class Real, class Set> constexpr void fill_all(Set &set) {
    for (int c = 0; c < kNumCandidates; ++c) set[kIdentity][c] = Rows<Real, Identity>::kernels();
    fill<Real, MinGRU>(set, kMinGRU);
    fill<Real, MinLSTM>(set, kMinLSTM);
    fill<Real, MinLSTMUnnormalised>(set, kMinLSTMUnnormalised);
}

constexpr RowTable make_rows() {
    RowTable table{};
    fill_all<float>(table.single);
    fill_all<double>(table.full);
    table.widen_bfloat16 = widen_bfloat16;
    table.narrow_bfloat16 = narrow_bfloat16;
    table.widen_float16 = widen_float16;
    table.narrow_float16 = narrow_float16;
    return table;
}

}  // namespace

namespace MINRNN_ISA {
extern constexpr RowTable rows = make_rows();
}

}  // namespace minrnn
