// The gate equations as functors, and the elementary functions they need.
//
// Every function here is branch-free scalar code: the loops in rows.cpp vectorise it. `Real` is float or
// double, and is the type in which gates are computed; the state is carried in double (see Recurrence).
#pragma once

#include <cstdint>

namespace minrnn {
namespace {  // internal linkage: each instruction set compiles its own copy, and the linker must not merge them

// ---------------------------------------------------------------------------------------------------------
// Elementary functions. NaN passes through all of them.

template <class Real> struct ExpConstants;

template <> struct ExpConstants<float> {
    using Bits = int32_t;
    static constexpr int mantissa_bits = 23;
    static constexpr float lowest = -87.33654f;        // exp(lowest) is the smallest normal number
    static constexpr float round_shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
    static constexpr float ln2_high = 0.693145752f, ln2_low = 1.42860677e-6f;
    static constexpr float log2_e = 1.44269504f;
    // Minimax on |r| <= ln(2)/2 with the constant fixed at one: 9e-8 relative, a float's own rounding is 6e-8.
    static constexpr float poly[] = {1.f, 0.9999997f, 0.49999148f, 0.16667639f, 0.041898161f, 0.0082902722f};
};

template <> struct ExpConstants<double> {
    using Bits = int64_t;
    static constexpr int mantissa_bits = 52;
    static constexpr double lowest = -708.39641853226408;
    static constexpr double round_shift = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr double ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
    static constexpr double log2_e = 1.44269504088896340736;
    static constexpr double poly[] = {  // 1/n!
        1.0, 1.0, 0.5, 1.6666666666666666e-1, 4.1666666666666664e-2, 8.3333333333333332e-3,
        1.3888888888888889e-3, 1.9841269841269841e-4, 2.4801587301587302e-5, 2.7557319223985893e-6,
        2.7557319223985888e-7, 2.5052108385441720e-8, 2.0876756987868100e-9, 1.6059043836821613e-10};
};

// exp(x) for x <= 0; arguments below the smallest normal result are clamped there.
template <class Real> inline Real exp_nonpositive(Real x) {
    using C = ExpConstants<Real>;
    using Bits = typename C::Bits;
    x = x < C::lowest ? C::lowest : x;  // false for NaN, which therefore stays
    const Real shifted = x * C::log2_e + C::round_shift;
    const Real n = shifted - C::round_shift;
    const Real r = (x - n * C::ln2_high) - n * C::ln2_low;
    constexpr int degree = static_cast<int>(sizeof(C::poly) / sizeof(Real)) - 1;
    Real p = C::poly[degree];
#pragma GCC unroll 16
    for (int i = degree - 1; i >= 0; --i) p = p * r + C::poly[i];
    const Bits scale = __builtin_bit_cast(Bits, shifted) << C::mantissa_bits;  // n, moved into the exponent
    return __builtin_bit_cast(Real, __builtin_bit_cast(Bits, p) + scale);
}

inline float absolute(float x) { return __builtin_fabsf(x); }
inline double absolute(double x) { return __builtin_fabs(x); }

// Sigmoids and candidates are fractions. A division costs as much as ten multiplications, so each fraction shows
// its denominator, a gate takes one reciprocal of the product of all, and each gets back its own.

template <class Real> struct Sigmoid {  // sigmoid(x) and sigmoid(-x): 1 - sigmoid(x) would lose the small one
    Real x, e, denominator;
    explicit inline Sigmoid(Real x) : x(x), e(exp_nonpositive(-absolute(x))), denominator(1 + e) {}
    inline Real numerator() const { return x >= 0 ? Real(1) : e; }
    inline Real complement_numerator() const { return x >= 0 ? e : Real(1); }
};

// ---------------------------------------------------------------------------------------------------------
// Candidates: the function that the candidate's pre-activation goes through, and its slope, both to be
// completed by `inverse` = 1 / denominator.

template <class Real> struct Positive {  // x + 0.5 for x >= 0, sigmoid(x) below: continuous, always above zero
    Real x, e, denominator;
    explicit inline Positive(Real x) : x(x), e(exp_nonpositive(-absolute(x))), denominator(1 + e) {}
    inline Real value(Real inverse) const { return x >= 0 ? x + Real(0.5) : e * inverse; }
    inline Real slope(Real inverse) const { return x >= 0 ? Real(1) : e * inverse * inverse; }
};

template <class Real> struct Linear {
    Real x;
    static constexpr Real denominator = 1;
    explicit inline Linear(Real x) : x(x) {}
    inline Real value(Real) const { return x; }
    inline Real slope(Real) const { return 1; }
};

template <class Real> struct Tanh {
    Real x, e, denominator;
    explicit inline Tanh(Real x) : x(x), e(exp_nonpositive(-2 * absolute(x))), denominator(1 + e) {}
    inline Real value(Real inverse) const {
        // (1 - e) / (1 + e) cancels near zero, so a short odd series takes over there.
        const Real far = (1 - e) * inverse, x2 = x * x;
        return absolute(x) < Real(0.125) ? x * (1 + x2 * series(x2)) : (x < 0 ? -far : far);
    }
    inline Real slope(Real inverse) const { return 4 * e * inverse * inverse; }

  private:
    // (tanh(x) / x - 1) / x^2 by its Taylor series: remainder below 1e-19 for |x| < 1/8.
    static inline Real series(Real x2) {
        Real p = Real(6404582.0 / 10854718875.0);
        p = p * x2 + Real(-929569.0 / 638512875.0);
        p = p * x2 + Real(21844.0 / 6081075.0);
        p = p * x2 + Real(-1382.0 / 155925.0);
        p = p * x2 + Real(62.0 / 2835.0);
        p = p * x2 + Real(-17.0 / 315.0);
        p = p * x2 + Real(2.0 / 15.0);
        return p * x2 + Real(-1.0 / 3.0);
    }
};

// ---------------------------------------------------------------------------------------------------------
// Gates. A gate maps one step's pre-activations to the recurrence h = a * h_prev + b, and the adjoint of h
// to the gradients of the pre-activations.

template <class Real> struct Recurrence {
    double a;
    Real b;
};

// a in double, from a and 1 - a, each of full relative accuracy in Real. Where forgetting is slow, subtracting in
// double keeps what Real would round away: with 1 - a = 1e-6, a float a has one digit of it left.
template <class Real> inline double decay(Real a, Real complement) {
    return complement < Real(0.5) ? 1.0 - static_cast<double>(complement) : static_cast<double>(a);
}

struct Identity {  // scan(a, b) itself
    static constexpr int num_pre = 2;
    template <class Real> static inline Recurrence<Real> forward(Real a, Real b, Real) {
        return {static_cast<double>(a), b};
    }
    template <class Real>
    static inline double backward(Real a, Real, Real, Real h_prev, Real dh, Real &da, Real &db, Real &) {
        da = dh * h_prev;
        db = dh;
        return static_cast<double>(a);
    }
};

template <template <class> class Candidate> struct MinGRU {  // a = 1 - z, b = z * candidate
    static constexpr int num_pre = 2;

    template <class Real> struct Values {
        Real z, complement, c, slope;
        inline Values(Real z_pre, Real c_pre) {
            const Sigmoid<Real> sigmoid(z_pre);
            const Candidate<Real> candidate(c_pre);
            const Real inverse = 1 / (sigmoid.denominator * candidate.denominator);
            const Real of_sigmoid = inverse * candidate.denominator, of_candidate = inverse * sigmoid.denominator;
            z = sigmoid.numerator() * of_sigmoid;
            complement = sigmoid.complement_numerator() * of_sigmoid;
            c = candidate.value(of_candidate);
            slope = candidate.slope(of_candidate);
        }
    };

    template <class Real> static inline Recurrence<Real> forward(Real z_pre, Real c_pre, Real) {
        const Values<Real> v(z_pre, c_pre);
        return {decay(v.complement, v.z), v.z * v.c};
    }

    template <class Real>
    static inline double backward(Real z_pre, Real c_pre, Real, Real h_prev, Real dh, Real &dz_pre,
                                  Real &dc_pre, Real &) {
        const Values<Real> v(z_pre, c_pre);
        dz_pre = dh * (v.c - h_prev) * (v.z * v.complement);
        dc_pre = dh * (v.z * v.slope);
        return decay(v.complement, v.z);
    }
};

template <template <class> class Candidate> struct MinLSTM {  // a = f / (f + i), b = i / (f + i) * candidate
    static constexpr int num_pre = 3;

    template <class Real> struct Values {
        Real f, i, f_complement, i_complement, c, slope;
        // With f = F / P and i = I / Q the shares are F Q / (F Q + I P) and I P / (F Q + I P). Where both gates
        // underflow, F and I are scaled so that the larger is one.
        inline Values(Real f_pre, Real i_pre, Real c_pre) {
            const Sigmoid<Real> forget(f_pre), input(i_pre);
            const Candidate<Real> candidate(c_pre);
            const Real ratio = exp_nonpositive(-absolute(f_pre - i_pre));
            const bool both_negative = (f_pre < 0) & (i_pre < 0), keeps = f_pre >= i_pre;
            const Real F = both_negative ? (keeps ? Real(1) : ratio) : forget.numerator();
            const Real I = both_negative ? (keeps ? ratio : Real(1)) : input.numerator();
            const Real P = forget.denominator, Q = input.denominator, C = candidate.denominator;
            const Real f_part = F * Q, i_part = I * P, sum = f_part + i_part, PQ = P * Q, sum_C = sum * C;
            const Real inverse = 1 / (PQ * sum_C);
            const Real of_sum = inverse * PQ * C, of_gates = inverse * sum_C;
            f = f_part * of_sum;
            i = i_part * of_sum;
            f_complement = forget.complement_numerator() * (of_gates * Q);
            i_complement = input.complement_numerator() * (of_gates * P);
            const Real of_candidate = inverse * PQ * sum;
            c = candidate.value(of_candidate);
            slope = candidate.slope(of_candidate);
        }
    };

    template <class Real> static inline Recurrence<Real> forward(Real f_pre, Real i_pre, Real c_pre) {
        const Values<Real> v(f_pre, i_pre, c_pre);
        return {decay(v.f, v.i), v.i * v.c};
    }

    template <class Real>
    static inline double backward(Real f_pre, Real i_pre, Real c_pre, Real h_prev, Real dh, Real &df_pre,
                                  Real &di_pre, Real &dc_pre) {
        const Values<Real> v(f_pre, i_pre, c_pre);
        const Real d = dh * (h_prev - v.c) * (v.f * v.i);
        df_pre = d * v.f_complement;
        di_pre = -d * v.i_complement;
        dc_pre = dh * (v.i * v.slope);
        return decay(v.f, v.i);
    }
};

template <template <class> class Candidate> struct MinLSTMUnnormalised {  // a = f, b = i * candidate
    static constexpr int num_pre = 3;

    template <class Real> struct Values {
        Real f, f_complement, i, i_complement, c, slope;
        inline Values(Real f_pre, Real i_pre, Real c_pre) {
            const Sigmoid<Real> forget(f_pre), input(i_pre);
            const Candidate<Real> candidate(c_pre);
            const Real P = forget.denominator, Q = input.denominator, C = candidate.denominator;
            const Real inverse = 1 / (P * Q * C);
            const Real of_forget = inverse * (Q * C), of_input = inverse * (P * C), of_candidate = inverse * (P * Q);
            f = forget.numerator() * of_forget;
            f_complement = forget.complement_numerator() * of_forget;
            i = input.numerator() * of_input;
            i_complement = input.complement_numerator() * of_input;
            c = candidate.value(of_candidate);
            slope = candidate.slope(of_candidate);
        }
    };

    template <class Real> static inline Recurrence<Real> forward(Real f_pre, Real i_pre, Real c_pre) {
        const Values<Real> v(f_pre, i_pre, c_pre);
        return {decay(v.f, v.f_complement), v.i * v.c};
    }

    template <class Real>
    static inline double backward(Real f_pre, Real i_pre, Real c_pre, Real h_prev, Real dh, Real &df_pre,
                                  Real &di_pre, Real &dc_pre) {
        const Values<Real> v(f_pre, i_pre, c_pre);
        df_pre = dh * h_prev * (v.f * v.f_complement);
        di_pre = dh * v.c * (v.i * v.i_complement);
        dc_pre = dh * (v.i * v.slope);
        return decay(v.f, v.f_complement);
    }
};

}  // namespace
}  // namespace minrnn
