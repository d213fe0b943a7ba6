// The loops of the selective scan, compiled with -DMINRNN_ISA=<name> and that instruction set's flags.
//
// Lanes are channels: B[t] and C[t] are broadcast, and arrays of a tile are padded to whole vectors.
// No template of the standard library is instantiated here, because the linker would merge the copies.
#include "selective.h"

#include "gates.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

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
// A tile is K neighbouring vectors of channels of one batch row, of which the first n channels exist.

constexpr int kMostVectors = 4;

template <class Real, int K> struct Tile {
    using V = Lanes<Real>;
    static constexpr int L = minrnn::kLanes<V>;
    static constexpr int64_t W = K * L;
    int64_t b, d, n;

    // A row of channels as it lies there if it fills the tile, or else a copy of it with zeros behind.
    MINRNN_INLINE const Real *whole(const Real *row, Real *buffer) const {
        if (n == W) return row;
        for (int64_t i = 0; i < n; ++i) buffer[i] = row[i];
        for (int64_t i = n; i < W; ++i) buffer[i] = 0;
        return buffer;
    }
    MINRNN_INLINE const Real *row(const Rows<const Real> &rows, int64_t t, Real *buffer) const {
        return whole(rows.at(b, t) + d, buffer);
    }
    // Where to write a row, and its way home if that is not its place.
    MINRNN_INLINE Real *target(const Rows<Real> &rows, int64_t t, Real *buffer) const {
        return n == W ? rows.at(b, t) + d : buffer;
    }
    MINRNN_INLINE void put(const Rows<Real> &rows, int64_t t, const Real *buffer) const {
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

// to[j][i] = scale * from[i][j]: A and the states of the caller have their channels first, ours have them last.
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

// Advances a tile by a step, h = 2^x h + drive B with x = delta rate, and returns y = sum C h. With kKeep, `states` takes
// h, and `rests` what Split's rest needs to become 2^x again: see BackwardTile::sweep.
//
//     2^x h = s h + s e h, with s a power of two and e = 2^r - 1 small
//
// The first product is exact and the second is small, so that decays near 1, of which x has all digits, keep them, and
// strong ones leave nothing of a large state behind, not even its rounding errors. But of an infinite state they may
// cancel: where one has been found, kCareful has the plain product and sum take their place.
template <class Real, int K, bool kKeep, bool kCareful>
MINRNN_INLINE void advance(int64_t N, const Real *rate, int64_t stride, const Real *delta, const Real *drive,
                           const Real *into, const Real *from, Pair<Real> state, Real *states, Real *rests, Real *y) {
    using V = Lanes<Real>;
    constexpr int L = Tile<Real, K>::L;
    for (int k = 0; k < K; ++k) {
        const V delta_k = load(delta + k * L), drive_k = load(drive + k * L);
        V sum{};
        for (int64_t j = 0; j < N; ++j) {
            const int64_t at = (j * K + k) * L;
            const Split<V> power(delta_k * load(rate + j * stride + k * L));
            const V e = power_less_one(power.rest), kept = power.scale * load(state.hi + at);
            V change = e * kept + drive_k * into[j];
            if constexpr (sizeof(Real) == sizeof(float)) change += power.scale * load(state.lo + at);
            V h = kept + change, low = change - (h - kept);
            if constexpr (kCareful) {
                const V plain = (e * power.scale + power.scale) * load(state.hi + at) + drive_k * into[j];
                low = is_finite(h) ? low : V{};
                h = is_finite(h) ? h : plain;
            }
            store(h, state.hi + at);
            if constexpr (sizeof(Real) == sizeof(float)) store(low, state.lo + at);
            if constexpr (kKeep) {
                store(h, states + at);
                store(e, rests + at);
            }
            sum += h * from[j];
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

// ---------------------------------------------------------------------------------------------------------
// Forward

template <class Real, int K> struct ForwardTile : Tile<Real, K> {
    using V = Lanes<Real>;
    using Tile<Real, K>::b, Tile<Real, K>::d, Tile<Real, K>::n, Tile<Real, K>::W, Tile<Real, K>::L;
    const ForwardCall<Real> &call;
    const Inputs<Real> &in;

    ForwardTile(const ForwardCall<Real> &call, int64_t b, int64_t d, int64_t n)
        : Tile<Real, K>{b, d, n}, call(call), in(call.in) {}

    void run(Real *workspace) const {
        const int64_t size = in.N * W;
        Real *const rate = workspace;
        const Pair<Real> state{rate + size, rate + 2 * size};
        alignas(64) Real skip_buffer[W], bias_buffer[W];
        const Real *skip = in.skip ? this->whole(in.skip + d, skip_buffer) : nullptr;
        const Real *bias = in.bias ? this->whole(in.bias + d, bias_buffer) : nullptr;
        gather(n, in.N, in.A + d * in.N, Real(kLog2E), rate, W);
        clear(state.hi, 2 * size);
        if (in.h0) gather(n, in.N, in.h0 + (b * in.D + d) * in.N, Real(1), state.hi, W);
        Real *const start = state.lo + size;  // of a run of steps that holds no reset after its first one
        for (int64_t i = 0; i < 2 * size; ++i) start[i] = state.hi[i];
        for (int64_t t = 0, end; t < in.T; t = end) {
            const bool fresh = in.resets(b, t);
            for (end = t + 1; end < in.T && !in.resets(b, end); ++end) {}
            if (call.borders && t % in.chunk == 0) save(t / in.chunk, state.hi);
            if (fresh) clear(state.hi, 2 * size);
            steps<false>(t, end, rate, skip, bias, state);
            if (all_finite(state.hi, size)) continue;
            for (int64_t i = 0; i < 2 * size; ++i) state.hi[i] = fresh ? Real(0) : start[i];
            steps<true>(t, end, rate, skip, bias, state);
        }
        Real *last = call.last + (b * in.D + d) * in.N;
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < in.N; ++j) last[i * in.N + j] = state.hi[j * W + i];
    }

  private:
    // Steps [first, end), of which only the first may forget, which has been done.
    template <bool kCareful>
    void steps(int64_t first, int64_t end, const Real *rate, const Real *skip, const Real *bias,
               Pair<Real> state) const {
        alignas(64) Real delta[W], drive[W], y[W], buffers[4][W];
        for (int64_t t = first; t < end; ++t) {
            if (call.borders && t > first && t % in.chunk == 0) save(t / in.chunk, state.hi);
            const Real *u = this->row(in.u, t, buffers[0]), *pre = this->row(in.delta_pre, t, buffers[1]);
            for (int k = 0; k < K; ++k) {
                const V step = Softplus<V>(with_bias<Real, K>(pre, bias, k)).value;
                store(step, delta + k * L);
                store(step * load(u + k * L), drive + k * L);
            }
            advance<Real, K, false, kCareful>(in.N, rate, W, delta, drive, in.into.at(b, t), in.from.at(b, t), state,
                                              nullptr, nullptr, y);
            Real *out = this->target(call.y, t, buffers[2]);
            const Real *z = in.z ? this->row(in.z, t, buffers[3]) : nullptr;
            for (int k = 0; k < K; ++k) {
                const V sum = with_skip<Real, K>(y, skip, u, k);
                store(z ? sum * Silu<V>(load(z + k * L)).value : sum, out + k * L);
            }
            this->put(call.y, t, out);
        }
    }

    void save(int64_t chunk, const Real *hi) const {
        Real *to = call.borders + (b * in.num_chunks() + chunk) * in.N * in.D + d;
        for (int64_t j = 0; j < in.N; ++j)
            for (int64_t i = 0; i < n; ++i) to[j * in.D + i] = hi[j * W + i];
    }
};

// ---------------------------------------------------------------------------------------------------------
// Backward: chunks from the last to the first; in a chunk all tiles of a group; in a tile the states of the chunk's
// steps again, and then their adjoints from the last step to the first.
//
//     g[t] = dy[t] C[t] + a[t+1] g[t+1]
//     dC[t] = sum_channels dy h;  dB[t] = sum_channels g delta u;  d(delta u) = sum_n g B;  d(delta A) = a g h_prev

// What a group of channels carries from chunk to chunk, N rows of all its channels each, and a chunk's part of dA.
template <class Real> struct Group {
    Real *rate;          // A log2(e)
    Pair<Real> carry;    // a[t+1] g[t+1]
    Real *drate;
    Group from(int64_t channel) const {
        return {rate + channel, {carry.hi + channel, carry.lo + channel}, drate + channel};
    }
};

// What a tile keeps of a chunk. W: channels of a tile; S: steps of a chunk.
template <class Real> struct Chunk {
    Real *states, *rests;              // (1 + S, N, W), the first before the chunk, and (S, N, W)
    Real *delta, *slope, *drive, *dy;  // (S, W)
    Pair<Real> state;                  // (N, W)
    Real *zeros;                       // (N, W)
    Real *dinto, *dfrom;               // (S, N, lanes), to be summed over the lanes: all tiles of a group add to them
};

template <class Real, int K> struct BackwardTile : Tile<Real, K> {
    using V = Lanes<Real>;
    using Tile<Real, K>::b, Tile<Real, K>::d, Tile<Real, K>::n, Tile<Real, K>::W, Tile<Real, K>::L;
    const BackwardCall<Real> &call;
    const Inputs<Real> &in;
    int64_t begin, end;  // steps
    Group<Real> group;   // from the tile's first channel on
    int64_t stride;      // channels of a row of the group
    Chunk<Real> chunk;
    const Real *skip, *bias;

    BackwardTile(const BackwardCall<Real> &call, int64_t b, int64_t d, int64_t n, int64_t begin, int64_t end,
                 Group<Real> group, int64_t stride, Chunk<Real> chunk)
        : Tile<Real, K>{b, d, n}, call(call), in(call.in), begin(begin), end(end), group(group), stride(stride),
          chunk(chunk) {}

    void run() {
        alignas(64) Real skip_buffer[W], bias_buffer[W], dskip[W] = {};
        skip = in.skip ? this->whole(in.skip + d, skip_buffer) : nullptr;
        bias = in.bias ? this->whole(in.bias + d, bias_buffer) : nullptr;
        if (!recompute<false>()) recompute<true>();
        if (finite_adjoints())
            for (int64_t t = end - 1; t >= begin; --t) adjoin<false>(t, dskip);
        else
            for (int64_t t = end - 1; t >= begin; --t) adjoin<true>(t, dskip);
        for (int64_t i = 0; i < n; ++i) call.dskip[b * in.D + d + i] += static_cast<double>(dskip[i]);
    }

  private:
    void start() const {
        const Real *border = call.borders + (b * in.num_chunks() + begin / in.chunk) * in.N * in.D + d;
        clear(chunk.state.lo, in.N * W);
        for (int64_t j = 0; j < in.N; ++j)
            for (int64_t i = 0; i < W; ++i)
                chunk.state.hi[j * W + i] = chunk.states[j * W + i] = i < n ? border[j * in.D + i] : Real(0);
    }

    // Whether all states were finite.
    template <bool kCareful> bool recompute() const {
        start();
        bool finite = true;
        for (int64_t t = begin; t < end; ++t) {
            if (in.resets(b, t)) {
                finite &= all_finite(chunk.state.hi, in.N * W);
                clear(chunk.state.hi, in.N * W);
                clear(chunk.state.lo, in.N * W);
            }
            recompute<kCareful>(t);
        }
        return finite & all_finite(chunk.state.hi, in.N * W);
    }

    template <bool kCareful> void recompute(int64_t t) const {
        const int64_t s = t - begin, size = in.N * W;
        alignas(64) Real y[W], buffers[3][W];
        const Real *u = this->row(in.u, t, buffers[0]), *pre = this->row(in.delta_pre, t, buffers[1]);
        Real *delta = chunk.delta + s * W, *slope = chunk.slope + s * W, *drive = chunk.drive + s * W;
        for (int k = 0; k < K; ++k) {
            const Softplus<V> step(with_bias<Real, K>(pre, bias, k));
            store(step.value, delta + k * L);
            store(step.slope, slope + k * L);
            store(step.value * load(u + k * L), drive + k * L);
        }
        advance<Real, K, true, kCareful>(in.N, group.rate, stride, delta, drive, in.into.at(b, t), in.from.at(b, t),
                                         chunk.state, chunk.states + (s + 1) * size, chunk.rests + s * size, y);
        const Real *dy = this->row(call.dy, t, buffers[2]);
        if (in.z) return ungate(t, u, y, dy);
        for (int k = 0; k < K; ++k) store(load(dy + k * L), chunk.dy + s * W + k * L);
    }

    // dz, and dy before the gate.
    MINRNN_INLINE void ungate(int64_t t, const Real *u, const Real *y, const Real *dy) const {
        alignas(64) Real buffers[2][W];
        const Real *z = this->row(in.z, t, buffers[0]);
        Real *dz = this->target(call.dz, t, buffers[1]);
        for (int k = 0; k < K; ++k) {
            const Silu<V> gate(load(z + k * L));
            const V dy_k = load(dy + k * L);
            store(dy_k * with_skip<Real, K>(y, skip, u, k) * gate.slope, dz + k * L);
            store(dy_k * gate.value, chunk.dy + (t - begin) * W + k * L);
        }
        this->put(call.dz, t, dz);
    }

    // Whether what adjoints are made of is finite.
    bool finite_adjoints() const {
        Real sum = 0;  // NaN, once something is not
        for (int64_t t = begin; t < end; ++t)
            for (int64_t j = 0; j < in.N; ++j) sum += in.from.at(b, t)[j] * 0;
        bool finite = sum == 0 && all_finite(chunk.dy, (end - begin) * W);
        for (int64_t j = 0; j < in.N; ++j) finite &= all_finite(group.carry.hi + j * stride, W);
        return finite;
    }

    template <bool kCareful> void adjoin(int64_t t, Real *dskip) const {
        const int64_t s = t - begin, size = in.N * W;
        const bool resets = in.resets(b, t);
        alignas(64) Real by_rate[W], by_drive[W], buffers[3][W];
        sweep<kCareful>(s, in.into.at(b, t), in.from.at(b, t), resets ? chunk.zeros : chunk.states + s * size, by_rate, by_drive);
        if (resets) forget();
        const Real *u = this->row(in.u, t, buffers[0]), *dy = chunk.dy + s * W;
        Real *du = this->target(call.du, t, buffers[1]), *ddelta_pre = this->target(call.ddelta_pre, t, buffers[2]);
        for (int k = 0; k < K; ++k) {
            const V of_drive = load(by_drive + k * L), u_k = load(u + k * L), dy_k = load(dy + k * L);
            const V of_delta = load(by_rate + k * L) * Real(kLn2) + of_drive * u_k;
            store(of_delta * load(chunk.slope + s * W + k * L), ddelta_pre + k * L);
            V of_u = of_drive * load(chunk.delta + s * W + k * L);
            if (skip) {
                of_u += load(skip + k * L) * dy_k;
                store(load(dskip + k * L) + dy_k * u_k, dskip + k * L);
            }
            store(of_u, du + k * L);
        }
        this->put(call.du, t, du);
        this->put(call.ddelta_pre, t, ddelta_pre);
    }

    template <bool kCareful>
    MINRNN_INLINE void sweep(int64_t s, const Real *into, const Real *from, const Real *before, Real *by_rate,
                             Real *by_drive) const {
        const Real *after = chunk.states + (s + 1) * in.N * W, *rests = chunk.rests + s * in.N * W;
        Real *const dinto = chunk.dinto + s * in.N * L, *const dfrom = chunk.dfrom + s * in.N * L;
        V dy[K], delta[K], drive[K], of_rate[K], of_drive[K];
        for (int k = 0; k < K; ++k) {
            dy[k] = load(chunk.dy + s * W + k * L);
            delta[k] = load(chunk.delta + s * W + k * L);
            drive[k] = load(chunk.drive + s * W + k * L);
            of_rate[k] = of_drive[k] = V{};
        }
        for (int64_t j = 0; j < in.N; ++j) {
            V of_into = load(dinto + j * L), of_from = load(dfrom + j * L);
            for (int k = 0; k < K; ++k) {
                const int64_t at = j * W + k * L, there = j * stride + k * L;
                const V carried = load(group.carry.hi + there), rate = load(group.rate + there);
                V g, low{};
                if constexpr (sizeof(Real) == sizeof(float)) {
                    const V change = dy[k] * from[j] + load(group.carry.lo + there);
                    g = carried + change;
                    low = change - (g - carried);
                } else {
                    g = dy[k] * from[j] + carried;
                }
                const V scale = Split<V>(delta[k] * rate).scale, e = load(rests + at), kept = scale * g;
                V next = e * kept + kept, next_hi = kept, next_lo = e * kept + scale * low;
                if constexpr (kCareful) {
                    const BitsOf<V> finite = is_finite(g);
                    next = finite ? next : (e * scale + scale) * g;
                    next_hi = finite ? kept : next;
                    next_lo = finite ? next_lo : V{};
                }
                const V of_exponent = next * load(before + at);
                if constexpr (sizeof(Real) == sizeof(float)) {
                    store(next_hi, group.carry.hi + there);
                    store(next_lo, group.carry.lo + there);
                } else {
                    store(next, group.carry.hi + there);
                }
                of_from += dy[k] * load(after + at);
                of_into += g * drive[k];
                of_drive[k] += g * into[j];
                of_rate[k] += of_exponent * rate;
                store(load(group.drate + there) + of_exponent * delta[k], group.drate + there);
            }
            store(of_into, dinto + j * L);
            store(of_from, dfrom + j * L);
        }
        for (int k = 0; k < K; ++k) {
            store(of_rate[k], by_rate + k * L);
            store(of_drive[k], by_drive + k * L);
        }
    }

    void forget() const {
        for (int64_t j = 0; j < in.N; ++j)
            for (int64_t i = 0; i < W; ++i) group.carry.hi[j * stride + i] = group.carry.lo[j * stride + i] = 0;
    }
};

template <class Real> struct BackwardGroup {
    static constexpr int L = kLanes<Lanes<Real>>;
    static constexpr int64_t W = kMostVectors * L;
    const BackwardCall<Real> &call;
    const Inputs<Real> &in;
    int64_t b, d, n, index;  // channels [d, d + n) of batch row b
    int64_t stride;
    Group<Real> group;
    Chunk<Real> chunk;

    // Arrays are powers of two long; one behind the other, all would share the same few sets of the first-level cache.
    static constexpr int64_t kStagger = 5 * 64 / sizeof(Real);

    static int64_t padded(int64_t n) { return (n + L - 1) / L * L; }

    static int64_t workspace(int64_t N, int64_t S, int64_t n) {
        return 4 * N * padded(n) + (2 * S + 1) * N * W + 4 * S * W + 3 * N * W + 2 * S * N * L + 15 * kStagger;
    }

    BackwardGroup(const BackwardCall<Real> &call, int64_t b, int64_t d, int64_t n, int64_t index, Real *workspace)
        : call(call), in(call.in), b(b), d(d), n(n), index(index), stride(padded(n)) {
        const int64_t N = in.N, S = in.chunk;
        const auto take = [&workspace](int64_t size) {
            Real *taken = workspace;
            workspace += size + kStagger;
            return taken;
        };
        for (Real **part : {&group.rate, &group.carry.hi, &group.carry.lo, &group.drate}) *part = take(N * stride);
        chunk.states = take((S + 1) * N * W);
        chunk.rests = take(S * N * W);
        for (Real **part : {&chunk.delta, &chunk.slope, &chunk.drive, &chunk.dy}) *part = take(S * W);
        for (Real **part : {&chunk.state.hi, &chunk.state.lo, &chunk.zeros}) *part = take(N * W);
        for (Real **part : {&chunk.dinto, &chunk.dfrom}) *part = take(S * N * L);
    }

    void run() const {
        const int64_t N = in.N, states = (b * in.D + d) * N;
        gather(n, N, in.A + d * N, Real(kLog2E), group.rate, stride);
        gather(n, N, call.dlast + states, Real(1), group.carry.hi, stride);
        clear(group.carry.lo, N * stride);
        clear(chunk.zeros, N * W);
        clear(call.dskip + b * in.D + d, n);
        for (int64_t j = 0; j < N; ++j) clear(call.dA + (b * N + j) * in.D + d, n);
        for (int64_t c = in.num_chunks() - 1; c >= 0; --c) {
            const int64_t begin = c * in.chunk, end = begin + in.chunk < in.T ? begin + in.chunk : in.T;
            clear(chunk.dinto, in.chunk * N * L);
            clear(chunk.dfrom, in.chunk * N * L);
            clear(group.drate, N * stride);
            for (int64_t first = 0; first < n;) {
                const int64_t vectors = (stride - first) / L;
                first += vectors >= 4 ? run_tile<4>(first, begin, end)
                                      : (vectors >= 2 ? run_tile<2>(first, begin, end) : run_tile<1>(first, begin, end));
            }
            const int64_t row = ((index * in.B + b) * in.T + begin) * N;
            add_lanes((end - begin) * N, chunk.dinto, call.dinto + row);
            add_lanes((end - begin) * N, chunk.dfrom, call.dfrom + row);
            add_rates();
        }
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < N; ++j)
                call.dh0[states + i * N + j] = group.carry.hi[j * stride + i] + group.carry.lo[j * stride + i];
    }

  private:
    template <int K> int64_t run_tile(int64_t first, int64_t begin, int64_t end) const {
        const int64_t left = n - first, width = left < K * L ? left : K * L;
        BackwardTile<Real, K>(call, b, d + first, width, begin, end, group.from(first), stride, chunk).run();
        return width;
    }

    static void add_lanes(int64_t count, const Real *from, Real *to) {
        for (int64_t i = 0; i < count; ++i) {
            Real sum = 0;
            for (int l = 0; l < L; ++l) sum += from[i * L + l];
            to[i] = sum;
        }
    }

    // A chunk's sum is a Real, the sum of chunks a double: there may be millions of steps.
    void add_rates() const {
        for (int64_t j = 0; j < in.N; ++j) {
            double *to = call.dA + (b * in.N + j) * in.D + d;
            for (int64_t i = 0; i < n; ++i) to[i] += static_cast<double>(group.drate[j * stride + i]);
        }
    }
};

// ---------------------------------------------------------------------------------------------------------
// The table

// Within its life, results and operands too small to be normal are zero. A state that decays with nothing to feed it,
// and the adjoint of steps that no loss looks at, would stay among them for ever, at 100 cycles each on some processors.
class FlushingSubnormals {
#if defined(__SSE2__)
    const unsigned before = _mm_getcsr();

  public:
    FlushingSubnormals() { _mm_setcsr(before | 0x8040); }
    ~FlushingSubnormals() { _mm_setcsr(before); }
#endif
};

template <class Real> int64_t forward_workspace(int64_t N) { return 5 * N * BackwardGroup<Real>::W; }

template <class Real> void forward(const ForwardCall<Real> &call, int64_t b, int64_t d, int64_t n, Real *workspace) {
    constexpr int64_t L = kLanes<Lanes<Real>>;
    [[maybe_unused]] const FlushingSubnormals flushing;
    for (int64_t first = 0; first < n; first += kMostVectors * L) {
        const int64_t left = n - first;
        if (left > 2 * L)
            ForwardTile<Real, 4>(call, b, d + first, left < 4 * L ? left : 4 * L).run(workspace);
        else if (left > L)
            ForwardTile<Real, 2>(call, b, d + first, left).run(workspace);
        else
            ForwardTile<Real, 1>(call, b, d + first, left).run(workspace);
    }
}

template <class Real>
void backward(const BackwardCall<Real> &call, int64_t b, int64_t d, int64_t n, int64_t group, Real *workspace) {
    [[maybe_unused]] const FlushingSubnormals flushing;
    BackwardGroup<Real>(call, b, d, n, group, workspace).run();
}

template <class Real> constexpr Kernels<Real> kernels() {
    return {forward_workspace<Real>, BackwardGroup<Real>::workspace, forward<Real>, backward<Real>};
}

}  // namespace

namespace MINRNN_ISA {
extern constexpr Table table = {kernels<float>(), kernels<double>()};
}

}  // namespace minrnn::selective
