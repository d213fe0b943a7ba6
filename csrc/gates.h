// The gate equations as functors, and the elementary functions they need.
//
// Every function here is branch-free scalar code: the loops in rows.cpp vectorise it. `Real` is float or
// double, and is the type in which gates are computed; the state is carried in double (see Recurrence).
#pragma once

#include <cstdint>

namespace minrnn {
namespace {  // internal linkage: each instruction set compiles its own copy, and the linker must not merge them

// ---------------------------------------------------------------------------------------------------------
// Elementary functions. Each is within 2 ulp over its range, and passes NaN through.

template <class Real> struct ExpConstants;

template <> struct ExpConstants<float> {
    using Bits = int32_t;
    static constexpr int mantissa_bits = 23;
    static constexpr float lowest = -87.33654f;        // exp(lowest) is the smallest normal number
    static constexpr float round_shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
    static constexpr float ln2_high = 0.693145752f, ln2_low = 1.42860677e-6f;
    static constexpr float log2_e = 1.44269504f;
    // Taylor coefficients 1/n!; |r| <= ln(2)/2 leaves a remainder of 4e-9 relative.
    static constexpr float taylor[] = {1.f, 1.f, 0.5f, 1.6666667e-1f, 4.1666668e-2f, 8.3333338e-3f,
                                       1.3888889e-3f, 1.9841270e-4f};
};

template <> struct ExpConstants<double> {
    using Bits = int64_t;
    static constexpr int mantissa_bits = 52;
    static constexpr double lowest = -708.39641853226408;
    static constexpr double round_shift = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr double ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
    static constexpr double log2_e = 1.44269504088896340736;
    static constexpr double taylor[] = {1.0,
                                        1.0,
                                        0.5,
                                        1.6666666666666666e-1,
                                        4.1666666666666664e-2,
                                        8.3333333333333332e-3,
                                        1.3888888888888889e-3,
                                        1.9841269841269841e-4,
                                        2.4801587301587302e-5,
                                        2.7557319223985893e-6,
                                        2.7557319223985888e-7,
                                        2.5052108385441720e-8,
                                        2.0876756987868100e-9,
                                        1.6059043836821613e-10};
};

// exp(x) for x <= 0; arguments below the smallest normal result are clamped there.
template <class Real> inline Real exp_nonpositive(Real x) {
    using C = ExpConstants<Real>;
    using Bits = typename C::Bits;
    x = x < C::lowest ? C::lowest : x;  // false for NaN, which therefore stays
    const Real shifted = x * C::log2_e + C::round_shift;
    const Real n = shifted - C::round_shift;
    const Real r = (x - n * C::ln2_high) - n * C::ln2_low;
    constexpr int degree = static_cast<int>(sizeof(C::taylor) / sizeof(Real)) - 1;
    Real p = C::taylor[degree];
#pragma GCC unroll 16
    for (int i = degree - 1; i >= 0; --i) p = p * r + C::taylor[i];
    const Bits scale = __builtin_bit_cast(Bits, shifted) << C::mantissa_bits;  // n, moved into the exponent
    return __builtin_bit_cast(Real, __builtin_bit_cast(Bits, p) + scale);
}

inline float absolute(float x) { return __builtin_fabsf(x); }
inline double absolute(double x) { return __builtin_fabs(x); }

// sigmoid(x) and sigmoid(-x), each with full relative accuracy: 1 - sigmoid(x) would lose it for large x.
template <class Real> struct Sigmoid {
    Real value, complement;
    explicit inline Sigmoid(Real x) {
        const Real e = exp_nonpositive(-absolute(x));
        const Real larger = 1 / (1 + e), smaller = e * larger;
        value = x >= 0 ? larger : smaller;
        complement = x >= 0 ? smaller : larger;
    }
};

// ---------------------------------------------------------------------------------------------------------
// Candidates: value and slope of the function that the candidate's pre-activation goes through.

template <class Real> struct Point {
    Real value, slope;
};

struct Positive {  // x + 0.5 for x >= 0, sigmoid(x) below: continuous, and always above zero
    template <class Real> static inline Point<Real> at(Real x) {
        const Real e = exp_nonpositive(-absolute(x));
        const Real s = e / (1 + e);  // sigmoid(-|x|)
        return {x >= 0 ? x + Real(0.5) : s, x >= 0 ? Real(1) : s - s * s};
    }
};

struct Linear {
    template <class Real> static inline Point<Real> at(Real x) { return {x, Real(1)}; }
};

struct Tanh {
    template <class Real> static inline Point<Real> at(Real x) {
        // (1 - e) / (1 + e) cancels near zero, so a short odd series takes over there.
        const Real u = absolute(x), e = exp_nonpositive(-2 * u), far = (1 - e) / (1 + e), x2 = x * x;
        const Real y = u < series_end<Real>() ? x * (1 + x2 * series(x2)) : (x < 0 ? -far : far);
        return {y, 4 * e / ((1 + e) * (1 + e))};
    }

  private:
    template <class Real> static constexpr Real series_end() { return Real(0.125); }
    // (tanh(x) / x - 1) / x^2 by its Taylor series: remainder below 1e-18 for |x| < 1/8.
    template <class Real> static inline Real series(Real x2) {
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

template <class Candidate> struct MinGRU {  // a = 1 - z, b = z * candidate, z = sigmoid(z_pre)
    static constexpr int num_pre = 2;
    template <class Real> static inline Recurrence<Real> forward(Real z_pre, Real c_pre, Real) {
        const Sigmoid<Real> z(z_pre);
        return {decay(z.complement, z.value), z.value * Candidate::at(c_pre).value};
    }
    template <class Real>
    static inline double backward(Real z_pre, Real c_pre, Real, Real h_prev, Real dh, Real &dz_pre,
                                  Real &dc_pre, Real &) {
        const Sigmoid<Real> z(z_pre);
        const Point<Real> c = Candidate::at(c_pre);
        dz_pre = dh * (c.value - h_prev) * (z.value * z.complement);
        dc_pre = dh * (z.value * c.slope);
        return decay(z.complement, z.value);
    }
};

// f / (f + i) and i / (f + i) for f = sigmoid(p), i = sigmoid(q), with one division, and right even where
// both underflow: numerator and denominator are scaled so that the larger sigmoid's numerator is one.
template <class Real> struct NormalisedGates {
    Real f, i, e_f, e_i;
    inline NormalisedGates(Real p, Real q) {
        e_f = exp_nonpositive(-absolute(p));
        e_i = exp_nonpositive(-absolute(q));
        const Real ratio = exp_nonpositive(-absolute(p - q));
        const bool both_negative = (p < 0) & (q < 0);
        const Real f_up = both_negative ? (p >= q ? Real(1) : ratio) : (p >= 0 ? Real(1) : e_f);
        const Real i_up = both_negative ? (p >= q ? ratio : Real(1)) : (q >= 0 ? Real(1) : e_i);
        const Real f_part = f_up * (1 + e_i), i_part = i_up * (1 + e_f), scale = 1 / (f_part + i_part);
        f = f_part * scale;
        i = i_part * scale;
    }
};

template <class Real> inline Real sigmoid_of_minus(Real x, Real e) {  // e = exp(-|x|)
    return (x >= 0 ? e : Real(1)) / (1 + e);
}

template <class Candidate> struct MinLSTM {  // a = f / (f + i), b = i / (f + i) * candidate
    static constexpr int num_pre = 3;
    template <class Real> static inline Recurrence<Real> forward(Real f_pre, Real i_pre, Real c_pre) {
        const NormalisedGates<Real> gates(f_pre, i_pre);
        return {decay(gates.f, gates.i), gates.i * Candidate::at(c_pre).value};
    }
    template <class Real>
    static inline double backward(Real f_pre, Real i_pre, Real c_pre, Real h_prev, Real dh, Real &df_pre,
                                  Real &di_pre, Real &dc_pre) {
        const NormalisedGates<Real> gates(f_pre, i_pre);
        const Point<Real> c = Candidate::at(c_pre);
        const Real d = dh * (h_prev - c.value) * (gates.f * gates.i);
        df_pre = d * sigmoid_of_minus(f_pre, gates.e_f);
        di_pre = -d * sigmoid_of_minus(i_pre, gates.e_i);
        dc_pre = dh * (gates.i * c.slope);
        return decay(gates.f, gates.i);
    }
};

template <class Candidate> struct MinLSTMUnnormalised {  // a = sigmoid(f_pre), b = sigmoid(i_pre) * candidate
    static constexpr int num_pre = 3;
    template <class Real> static inline Recurrence<Real> forward(Real f_pre, Real i_pre, Real c_pre) {
        const Sigmoid<Real> f(f_pre);
        return {decay(f.value, f.complement), Sigmoid<Real>(i_pre).value * Candidate::at(c_pre).value};
    }
    template <class Real>
    static inline double backward(Real f_pre, Real i_pre, Real c_pre, Real h_prev, Real dh, Real &df_pre,
                                  Real &di_pre, Real &dc_pre) {
        const Sigmoid<Real> f(f_pre), i(i_pre);
        const Point<Real> c = Candidate::at(c_pre);
        df_pre = dh * h_prev * (f.value * f.complement);
        di_pre = dh * c.value * (i.value * i.complement);
        dc_pre = dh * (i.value * c.slope);
        return decay(f.value, f.complement);
    }
};

}  // namespace
}  // namespace minrnn
