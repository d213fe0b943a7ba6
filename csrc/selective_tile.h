// The elementary functions of the selective scan, and one step of a tile of channels.
//
// Lanes are channels: B[t] and C[t] are broadcast, and arrays of a tile are padded to whole vectors.
#pragma once

#include "gates.h"
#include "selective.h"

namespace minrnn::selective {
namespace {

// ---------------------------------------------------------------------------------------------------------
// Elementary functions

// 2^r - 1 = r q(r) for |r| <= 1/2; q's coefficients from the constant on.
template <class Real> struct Power;
template <> struct Power<float> {
    static constexpr float lowest = -126.0f;           // 2^lowest is the smallest normal number
    static constexpr float round_shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
    static constexpr int mantissa_bits = 23, exponent_bias = 127;
    // Minimax for the relative error of 2^r - 1: 4.4e-7, and 6e-8 near zero, where decay is slow.
    static constexpr float q[] = {0.69314714f, 0.24022351f, 0.055505003f, 0.0096662454f, 0.0013333539f};
};
template <> struct Power<double> {
    static constexpr double lowest = -1022.0;
    static constexpr double round_shift = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr int mantissa_bits = 52, exponent_bias = 1023;
    static constexpr double q[] = {  // ln(2)^n / n!
        6.9314718055994531e-1, 2.4022650695910071e-1, 5.5504108664821580e-2,  9.6181291076284772e-3,
        1.3333558146428443e-3, 1.5403530393381609e-4, 1.5252733804059840e-5,  1.3215486790144307e-6,
        1.0178086009239699e-7, 7.0549116208011233e-9, 4.4455382718708110e-10, 2.5678435993488201e-11,
        1.3691488853904128e-12};
};

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.69314718055994531;

// x as an integer and a rest of at most one half, and 2 to the power of the integer. (AVX-512 has instructions for this,
// which are no faster: they share the port of the multiplications.)
template <class V> struct Split {
    V rest, scale;
    explicit MINRNN_INLINE Split(V x) {
        using P = Power<RealOf<V>>;
        x = at_least(x, P::lowest);
        const V shifted = x + P::round_shift;
        rest = x - (shifted - P::round_shift);
        scale = (V)(((BitsOf<V>)shifted + P::exponent_bias) << P::mantissa_bits);
    }
};

template <class V> MINRNN_INLINE V power_less_one(V r) {  // 2^r - 1 for |r| <= 1/2
    using P = Power<RealOf<V>>;
    constexpr int degree = static_cast<int>(sizeof(P::q) / sizeof(P::q[0])) - 1;
    V q = splat<V>(P::q[degree]);
#pragma GCC unroll 16
    for (int i = degree - 1; i >= 0; --i) q = q * r + P::q[i];
    return q * r;
}

template <class V> struct Softplus {  // log(1 + exp(x)), of full relative accuracy, and its slope
    V value, slope;
    explicit MINRNN_INLINE Softplus(V x) {
        using Real = RealOf<V>;
        // log(1 + e) = 2 artanh(s) with s = e / (2 + e) <= 1/3: the series ends below half a rounding error.
        constexpr int terms = sizeof(Real) == sizeof(float) ? 7 : 16;
        const V e = exp_nonpositive(-absolute(x)), inverse = reciprocal((1 + e) * (2 + e));
        const V s = e * (1 + e) * inverse, s2 = s * s, share = (2 + e) * inverse;
        V p = splat<V>(Real(2.0 / (2 * terms - 1)));
#pragma GCC unroll 16
        for (int i = terms - 2; i >= 0; --i) p = p * s2 + Real(2.0 / (2 * i + 1));
        value = at_least(x, Real(0)) + s * p;
        slope = x >= 0 ? share : e * share;
    }
};

template <class V> MINRNN_INLINE BitsOf<V> is_finite(V x) { return x - x == 0; }

template <class V> struct Silu {  // x sigmoid(x), and its slope
    V value, slope;
    explicit MINRNN_INLINE Silu(V x) {
        const Sigmoid<V> sigmoid(x);
        value = x * sigmoid.value();
        slope = sigmoid.value() + value * sigmoid.complement();
    }
};

// ---------------------------------------------------------------------------------------------------------
// A tile is K neighboring vectors of channels of one batch row, of which the first n channels exist.

constexpr int kMostVectors = 4;

template <class Real, int K> struct Tile {
    using V = Lanes<Real>;
    static constexpr int L = minrnn::kLanes<V>;
    static constexpr int64_t W = K * L;
    int64_t b, d, n;

    // A row of channels in place if it fills the tile, else a copy padded with zeros.
    MINRNN_INLINE const Real *whole(const Real *row, Real *buffer) const {
        if (n == W) return row;
        for (int64_t i = 0; i < n; ++i) buffer[i] = row[i];
        for (int64_t i = n; i < W; ++i) buffer[i] = 0;
        return buffer;
    }
    MINRNN_INLINE const Real *row(const Sequence<const Real> &rows, int64_t t, Real *buffer) const {
        return whole(rows.at(b, t) + d, buffer);
    }
    // Where to write a row: in place, or a buffer that `put` then copies.
    MINRNN_INLINE Real *target(const Sequence<Real> &rows, int64_t t, Real *buffer) const {
        return n == W ? rows.at(b, t) + d : buffer;
    }
    MINRNN_INLINE void put(const Sequence<Real> &rows, int64_t t, const Real *buffer) const {
        if (n == W) return;
        Real *to = rows.at(b, t) + d;
        for (int64_t i = 0; i < n; ++i) to[i] = buffer[i];
    }
};

template <class Real> void clear(Real *to, int64_t size) {
    for (int64_t i = 0; i < size; ++i) to[i] = 0;
}

template <class Real> bool all_finite(const Real *x, int64_t size) {  // size: a multiple of the lanes
    using V = Lanes<Real>;
    BitsOf<V> found = is_finite(load(x));
    for (int64_t i = kLanes<V>; i < size; i += kLanes<V>) found &= is_finite(load(x + i));
    for (int l = 0; l < kLanes<V>; ++l)
        if (!found[l]) return false;
    return true;
}

// to[j][i] = scale * from[i][j]: A and the states of the caller have their channels first, the kernels' last.
template <class Real>
void gather(int64_t n, int64_t N, const Real *from, Real scale, Real *to, int64_t width) {
    for (int64_t j = 0; j < N; ++j) {
        for (int64_t i = 0; i < n; ++i) to[j * width + i] = scale * from[i * N + j];
        for (int64_t i = n; i < width; ++i) to[j * width + i] = 0;
    }
}

// The state of a tile, or its adjoint: N rows of channels, each an unevaluated sum hi + lo (see Carry in gates.h).
template <class Real> struct Pair {
    Real *hi, *lo;
};

// Advances a tile by a step, h = 2^x h + delta u B with x = delta rate, and returns y = sum C h. With kKeep, `states`
// takes h, and `rests` e, from which BackwardTile::sweep computes 2^x again.
//
//     2^x h = s h + s e h, with s a power of two and e = 2^r - 1 small
//
// The first product is exact and the second is small, so that decays near 1, of which x has all digits, keep them, and
// strong ones leave nothing of a large state behind, not even its rounding errors. But with an infinite state they may
// cancel: where one was found, kCareful takes the plain product and sum instead.
template <class Real, int K, bool kKeep, bool kCareful>
MINRNN_INLINE void advance(int64_t N, const Real *rate, int64_t stride, const Real *delta, const Real *delta_u,
                           const Real *B, const Real *C, Pair<Real> state, Real *states, Real *rests, Real *y) {
    using V = Lanes<Real>;
    constexpr int L = Tile<Real, K>::L;
    for (int k = 0; k < K; ++k) {
        const V delta_k = load(delta + k * L), delta_u_k = load(delta_u + k * L);
        V sum{};
        for (int64_t j = 0; j < N; ++j) {
            const int64_t at = (j * K + k) * L;
            const Split<V> power(delta_k * load(rate + j * stride + k * L));
            const V e = power_less_one(power.rest), kept = power.scale * load(state.hi + at);
            V change = e * kept + delta_u_k * B[j];
            if constexpr (sizeof(Real) == sizeof(float)) change += power.scale * load(state.lo + at);
            V h = kept + change, low = change - (h - kept);
            if constexpr (kCareful) {
                const V plain = (e * power.scale + power.scale) * load(state.hi + at) + delta_u_k * B[j];
                low = is_finite(h) ? low : V{};
                h = is_finite(h) ? h : plain;
            }
            store(h, state.hi + at);
            if constexpr (sizeof(Real) == sizeof(float)) store(low, state.lo + at);
            if constexpr (kKeep) {
                store(h, states + at);
                store(e, rests + at);
            }
            sum += h * C[j];
        }
        store(sum, y + k * L);
    }
}

// y = sum C h + D u
template <class Real, int K>
MINRNN_INLINE Lanes<Real> with_skip(const Real *y, const Real *skip, const Real *u, int k) {
    constexpr int L = Tile<Real, K>::L;
    return skip ? load(y + k * L) + load(skip + k * L) * load(u + k * L) : load(y + k * L);
}

// delta_pre + bias
template <class Real, int K> MINRNN_INLINE Lanes<Real> with_bias(const Real *pre, const Real *bias, int k) {
    constexpr int L = Tile<Real, K>::L;
    return bias ? load(pre + k * L) + load(bias + k * L) : load(pre + k * L);
}

}  // namespace
}  // namespace minrnn::selective
