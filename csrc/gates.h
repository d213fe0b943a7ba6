// The gate equations as functors, and the elementary functions they need.
//
// Everything here is branch-free and works on vectors of channels (lanes.h); `V` is such a vector, of the type in which
// gates are computed. NaN passes through all of it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "lanes.h"

namespace minrnn {
namespace {

// ---------------------------------------------------------------------------------------------------------
// Elementary functions

template <class Real> struct ExpConstants;

template <> struct ExpConstants<float> {
    static constexpr int mantissa_bits = 23;
    static constexpr float lowest = -87.33654f;        // exp(lowest) is the smallest normal number
    static constexpr float negligible = -17.5f;        // 1 + exp(negligible) is 1
    static constexpr float round_shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    // n * ln2 is not rounded before it is subtracted, so one constant is enough: 2.4e-7 relative at the lowest x.
    static constexpr float ln2_high = 0.693147182f, ln2_low = 0;
#else
    static constexpr float ln2_high = 0.693145752f, ln2_low = 1.42860677e-6f;
#endif
    static constexpr float log2_e = 1.44269504f;
    // Minimax on |r| <= ln(2)/2 with the constant fixed at one: 9e-8 relative, a float's own rounding is 6e-8.
    static constexpr float poly[] = {1.f, 0.9999997f, 0.49999148f, 0.16667639f, 0.041898161f, 0.0082902722f};
};

template <> struct ExpConstants<double> {
    static constexpr int mantissa_bits = 52;
    static constexpr double lowest = -708.39641853226408;
    static constexpr double negligible = -37.5;
    static constexpr double round_shift = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr double ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
    static constexpr double log2_e = 1.44269504088896340736;
    static constexpr double poly[] = {  // 1/n!
        1.0, 1.0, 0.5, 1.6666666666666666e-1, 4.1666666666666664e-2, 8.3333333333333332e-3,
        1.3888888888888889e-3, 1.9841269841269841e-4, 2.4801587301587302e-5, 2.7557319223985893e-6,
        2.7557319223985888e-7, 2.5052108385441720e-8, 2.0876756987868100e-9, 1.6059043836821613e-10};
};

// exp(x) for x <= 0; arguments below the smallest normal result are clamped there.
template <class V> MINRNN_INLINE V exp_nonpositive(V x) {
    using C = ExpConstants<RealOf<V>>;
    x = at_least(x, C::lowest);
    const V shifted = x * C::log2_e + C::round_shift;
    const V n = shifted - C::round_shift;
    V r = x - n * C::ln2_high;
    if constexpr (C::ln2_low != 0) r -= n * C::ln2_low;
    constexpr int degree = static_cast<int>(sizeof(C::poly) / sizeof(C::poly[0])) - 1;
    V p = splat<V>(C::poly[degree]);
#pragma GCC unroll 16
    for (int i = degree - 1; i >= 0; --i) p = p * r + C::poly[i];
    return (V)((BitsOf<V>)p + ((BitsOf<V>)shifted << C::mantissa_bits));  // n, moved into the exponent
}

// sigmoid(x) and sigmoid(-x), each of full relative accuracy: 1 - sigmoid(x) would lose the small one. Selections go by
// the sign bit, so that all of them agree on -0.
template <class V> struct Sigmoid {
    V x, large, small;  // of the two, the one above one half and the one below
    BitsOf<V> negative;
    explicit MINRNN_INLINE Sigmoid(V x) : x(x), negative(has_sign(x)) {
        const V e = exp_nonpositive(minus_absolute(x));
        large = reciprocal(1 + e);
        small = e * large;
    }
    MINRNN_INLINE V value() const { return negative ? small : large; }
    MINRNN_INLINE V complement() const { return negative ? large : small; }
};

// ---------------------------------------------------------------------------------------------------------
// Candidates: the function that the candidate's pre-activation goes through, and its slope.

template <class V> struct Positive {  // x + 0.5 for x >= 0, sigmoid(x) below: continuous, always above zero
    V value, slope;
    explicit MINRNN_INLINE Positive(V x) {
        const V e = exp_nonpositive(minus_absolute(x)), large = reciprocal(1 + e), small = e * large;
        value = x >= 0 ? x + RealOf<V>(0.5) : small;
        slope = x >= 0 ? splat<V>(1) : small * large;
    }
};

template <class V> struct Linear {
    V value, slope;
    explicit MINRNN_INLINE Linear(V x) : value(x), slope(splat<V>(1)) {}
};

template <class V> struct Tanh {
    V value, slope;
    explicit MINRNN_INLINE Tanh(V x) {
        using Real = RealOf<V>;
        const V e = exp_nonpositive(-2 * absolute(x)), inverse = reciprocal(1 + e);
        // (1 - e) / (1 + e) cancels near zero, so a short odd series takes over there.
        const V far = (1 - e) * inverse, x2 = x * x;
        value = absolute(x) < Real(0.125) ? x * (1 + x2 * series(x2)) : (x < 0 ? -far : far);
        slope = 4 * e * inverse * inverse;
    }

  private:
    // (tanh(x) / x - 1) / x^2 by its Taylor series: remainder below 1e-19 for |x| < 1/8.
    static MINRNN_INLINE V series(V x2) {
        using Real = RealOf<V>;
        V p = splat<V>(Real(6404582.0 / 10854718875.0));
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
// The recurrence h = a h_prev + b.
//
// The state is an unevaluated sum hi + lo: in one float, an update far smaller than the state is rounded away, and the
// error grows with T. A double would do as well, but its conversions cost three times as much as the second float.
// For the same reason a is not enough where it is near 1: with 1 - a = 1e-6, a float a has one digit of its distance
// from 1 left. Wherever a is above one half it is therefore given as 1 + m, and m = a - 1 has full relative accuracy.

template <class V> struct Carry {
    V hi, lo;
};

template <class V> struct Decay {
    BitsOf<V> slow;  // lanes in which a = 1 + m; in the others a = m
    V m;
};

// A decay in (-1, 1): a = 1 + m, negated where `sign` is negative, with m in [-1, 0] of full relative accuracy, so that
// it is exact near both ends. Near zero it is off by the rounding of a number near one, and so is a h: what is left of
// that error is a small share of it after the next step.
template <class V> struct SignedDecay {
    V sign, m;
};

template <class V, bool is_signed> using DecayOf = std::conditional_t<is_signed, SignedDecay<V>, Decay<V>>;

// Decays of two numbers whose sum is one: a = kept in (0, 1), or signed a = kept - forgotten in (-1, 1).

template <bool is_signed, class V> MINRNN_INLINE DecayOf<V, is_signed> decay(V kept, V forgotten) {
    if constexpr (is_signed) {
        const V difference = kept - forgotten;
        return {difference, -2 * (difference < 0 ? kept : forgotten)};
    } else {
        const BitsOf<V> slow = forgotten < RealOf<V>(0.5);
        return {slow, slow ? -forgotten : kept};
    }
}
// kept: a sigmoid. m is the smaller of it and its complement, negative where the sigmoid is the larger.
template <class V> MINRNN_INLINE Decay<V> decay(const Sigmoid<V> &kept) {
    return {~kept.negative, flip_sign(kept.small, -kept.x)};
}
// forgotten: a sigmoid.
template <bool is_signed, class V> MINRNN_INLINE DecayOf<V, is_signed> decay_of_complement(const Sigmoid<V> &forgotten) {
    if constexpr (is_signed)
        return {-forgotten.x, -2 * forgotten.small};
    else
        return {forgotten.negative, flip_sign(forgotten.small, forgotten.x)};
}

// The derivative of the decay with respect to what is kept.
template <class V, bool is_signed> constexpr RealOf<V> kSlope = is_signed ? 2 : 1;

template <class V, class A = Decay<V>> struct Recurrence {
    A a;
    V b;
};

MINRNN_INLINE Carry<Floats> advance(Carry<Floats> h, Recurrence<Floats> r) {
    const Floats change = r.a.m * h.hi + r.b, with_lo = change + h.lo;
    const Floats delta = r.a.slow ? with_lo : change;
    const Floats sum = h.hi + delta, error = delta - (sum - h.hi);
    return {r.a.slow ? sum : change, r.a.slow ? error : Floats{}};
}

MINRNN_INLINE Carry<Doubles> advance(Carry<Doubles> h, Recurrence<Doubles> r) {
    const Doubles change = r.a.m * h.hi + r.b;
    return {r.a.slow ? h.hi + change : change, h.lo};
}

// Reflected first: from there on the decay is 1 + m.
MINRNN_INLINE Carry<Floats> advance(Carry<Floats> h, Recurrence<Floats, SignedDecay<Floats>> r) {
    const Floats hi = flip_sign(h.hi, r.a.sign), lo = flip_sign(h.lo, r.a.sign);
    const Floats delta = r.a.m * hi + r.b + lo, sum = hi + delta;
    return {sum, delta - (sum - hi)};
}

MINRNN_INLINE Carry<Doubles> advance(Carry<Doubles> h, Recurrence<Doubles, SignedDecay<Doubles>> r) {
    const Doubles hi = flip_sign(h.hi, r.a.sign);
    return {hi + (r.a.m * hi + r.b), h.lo};
}

template <class V, template <class> class A> MINRNN_INLINE Carry<V> multiply(Carry<V> h, A<V> a) {
    return advance(h, Recurrence<V, A<V>>{a, V{}});
}

// carry + x, whichever is larger
MINRNN_INLINE Carry<Floats> add(Carry<Floats> carry, Floats x) {
    const Floats sum = carry.hi + x, from_x = sum - carry.hi;
    return {sum, ((carry.hi - (sum - from_x)) + (x - from_x)) + carry.lo};
}

MINRNN_INLINE Carry<Doubles> add(Carry<Doubles> carry, Doubles x) { return {carry.hi + x, carry.lo}; }

// ---------------------------------------------------------------------------------------------------------
// Gates. A gate maps one step's pre-activations to the recurrence, and the adjoint of h to their gradients.

template <class V, class A = Decay<V>> struct Gradients {
    V d0, d1, d2;
    A a;
};

struct PlainScan {  // a and b themselves
    static constexpr int num_pre = 2;

    template <class V> static MINRNN_INLINE Decay<V> nearest(V a) {
        const BitsOf<V> slow = a > RealOf<V>(0.5);
        return {slow, slow ? a - 1 : a};
    }
    template <class V> static MINRNN_INLINE Recurrence<V> forward(V a, V b, V) { return {nearest(a), b}; }
    template <class V> static MINRNN_INLINE Gradients<V> backward(V a, V, V, V h_prev, V dh) {
        return {dh * h_prev, dh, V{}, nearest(a)};
    }
};

template <template <class> class, bool> using Identity = PlainScan;

// a = 1 - z, or signed a = 1 - 2 z; b = z * candidate
template <template <class> class Candidate, bool is_signed> struct MinGRU {
    static constexpr int num_pre = 2;

    template <class V> static MINRNN_INLINE Recurrence<V, DecayOf<V, is_signed>> forward(V z_pre, V c_pre, V) {
        const Sigmoid<V> z(z_pre);
        const Candidate<V> c(c_pre);
        return {decay_of_complement<is_signed>(z), z.value() * c.value};
    }

    template <class V>
    static MINRNN_INLINE Gradients<V, DecayOf<V, is_signed>> backward(V z_pre, V c_pre, V, V h_prev, V dh) {
        const Sigmoid<V> z(z_pre);
        const Candidate<V> c(c_pre);
        return {dh * (c.value - kSlope<V, is_signed> * h_prev) * (z.large * z.small), dh * (z.value() * c.slope), V{},
                decay_of_complement<is_signed>(z)};
    }
};

// f / (f + i) and i / (f + i) of two sigmoids, and each sigmoid's complement.
template <class V> struct Shares {
    V f, i, f_complement, i_complement;
    // sigmoid(x) is N(x) / (1 + e(x)) with e = exp(-|x|) and N = 1 or e, so the shares are F Q / (F Q + I P) and
    // I P / (F Q + I P). Where 1 + e is 1 for both and F and I are exponentials, which may underflow, both are taken
    // relative to the larger.
    MINRNN_INLINE Shares(V f_pre, V i_pre) {
        const V larger = f_pre > i_pre ? f_pre : i_pre;
        const BitsOf<V> tiny = larger < ExpConstants<RealOf<V>>::negligible;
        const V shift = tiny ? larger : V{};
        const V f_shifted = f_pre - shift, i_shifted = i_pre - shift;
        const V ef = exp_nonpositive(minus_absolute(f_shifted)), ei = exp_nonpositive(minus_absolute(i_shifted));
        const BitsOf<V> f_positive = f_shifted >= 0, i_positive = i_shifted >= 0;
        const V P = 1 + (tiny ? V{} : ef), Q = 1 + (tiny ? V{} : ei);
        const V f_part = (f_positive ? splat<V>(1) : ef) * Q, i_part = (i_positive ? splat<V>(1) : ei) * P;
        const V inverse = reciprocal(f_part + i_part);
        f = f_part * inverse;
        i = i_part * inverse;
        f_complement = (f_positive & ~tiny ? ef : splat<V>(1)) * reciprocal(P);
        i_complement = (i_positive & ~tiny ? ei : splat<V>(1)) * reciprocal(Q);
    }
};

// a = f / (f + i), or signed a = (f - i) / (f + i); b = i / (f + i) * candidate
template <template <class> class Candidate, bool is_signed> struct MinLSTM {
    static constexpr int num_pre = 3;

    template <class V> static MINRNN_INLINE Recurrence<V, DecayOf<V, is_signed>> forward(V f_pre, V i_pre, V c_pre) {
        const Shares<V> share(f_pre, i_pre);
        const Candidate<V> c(c_pre);
        return {decay<is_signed>(share.f, share.i), share.i * c.value};
    }

    template <class V>
    static MINRNN_INLINE Gradients<V, DecayOf<V, is_signed>> backward(V f_pre, V i_pre, V c_pre, V h_prev, V dh) {
        const Shares<V> share(f_pre, i_pre);
        const Candidate<V> c(c_pre);
        const V d = dh * (kSlope<V, is_signed> * h_prev - c.value) * (share.f * share.i);
        return {d * share.f_complement, -d * share.i_complement, dh * (share.i * c.slope),
                decay<is_signed>(share.f, share.i)};
    }
};

// a = f, b = i * candidate
template <template <class> class Candidate, bool is_signed> struct MinLSTMUnnormalized {
    static_assert(!is_signed);
    static constexpr int num_pre = 3;

    template <class V> static MINRNN_INLINE Recurrence<V> forward(V f_pre, V i_pre, V c_pre) {
        const Sigmoid<V> f(f_pre), i(i_pre);
        const Candidate<V> c(c_pre);
        return {decay(f), i.value() * c.value};
    }

    template <class V>
    static MINRNN_INLINE Gradients<V> backward(V f_pre, V i_pre, V c_pre, V h_prev, V dh) {
        const Sigmoid<V> f(f_pre), i(i_pre);
        const Candidate<V> c(c_pre);
        return {dh * h_prev * (f.large * f.small), dh * c.value * (i.large * i.small), dh * (i.value() * c.slope),
                decay(f)};
    }
};

// a = 1 - alpha delta, b = alpha * candidate
template <template <class> class Candidate, bool is_signed> struct MinEMA {
    static_assert(!is_signed);
    static constexpr int num_pre = 3;

    template <class V> static MINRNN_INLINE Decay<V> decay_of(const Sigmoid<V> &alpha, const Sigmoid<V> &delta) {
        // 1 - alpha delta = (1 - alpha) + alpha (1 - delta), of which nothing cancels
        return decay<false>(alpha.complement() + alpha.value() * delta.complement(), alpha.value() * delta.value());
    }

    template <class V> static MINRNN_INLINE Recurrence<V> forward(V alpha_pre, V delta_pre, V c_pre) {
        const Sigmoid<V> alpha(alpha_pre), delta(delta_pre);
        const Candidate<V> c(c_pre);
        return {decay_of(alpha, delta), alpha.value() * c.value};
    }

    template <class V>
    static MINRNN_INLINE Gradients<V> backward(V alpha_pre, V delta_pre, V c_pre, V h_prev, V dh) {
        const Sigmoid<V> alpha(alpha_pre), delta(delta_pre);
        const Candidate<V> c(c_pre);
        return {dh * (c.value - delta.value() * h_prev) * (alpha.large * alpha.small),
                -dh * h_prev * (alpha.value() * (delta.large * delta.small)), dh * (alpha.value() * c.slope),
                decay_of(alpha, delta)};
    }
};

// The gates: the functor, the name in Python, and whether there is a signed form.
#define MINRNN_GATES(X)                                   \
    X(Identity, "identity", false)                        \
    X(MinGRU, "mingru", true)                             \
    X(MinLSTM, "minlstm", true)                           \
    X(MinLSTMUnnormalized, "minlstm_unnormalized", false) \
    X(MinEMA, "minema", false)

}  // namespace
}  // namespace minrnn
