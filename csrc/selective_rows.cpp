// The loops of the selective scan, compiled with -DMINRNN_ISA=<name> and that instruction set's flags.
//
// No template of the standard library is instantiated here, because the linker would merge the copies.
#include "selective_tile.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace minrnn::selective {
namespace {

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
        if (in.h0) gather(n, in.N, in.h0 + (b * in.channels + d) * in.N, Real(1), state.hi, W);
        Real *const start = state.lo + size;  // of a run of steps that holds no reset after its first one
        for (int64_t i = 0; i < 2 * size; ++i) start[i] = state.hi[i];
        for (int64_t t = 0, end; t < in.T; t = end) {
            const bool fresh = in.reset.at(b, t);
            for (end = t + 1; end < in.T && !in.reset.at(b, end); ++end) {}
            if (call.borders && t % in.chunk == 0) save(t / in.chunk, state.hi);
            if (fresh) clear(state.hi, 2 * size);
            steps<false>(t, end, rate, skip, bias, state);
            if (all_finite(state.hi, size)) continue;
            for (int64_t i = 0; i < 2 * size; ++i) state.hi[i] = fresh ? Real(0) : start[i];
            steps<true>(t, end, rate, skip, bias, state);
        }
        Real *last = call.last + (b * in.channels + d) * in.N;
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < in.N; ++j) last[i * in.N + j] = state.hi[j * W + i];
    }

  private:
    // Steps [first, end), of which only the first may be a reset, which is already applied.
    template <bool kCareful>
    void steps(int64_t first, int64_t end, const Real *rate, const Real *skip, const Real *bias,
               Pair<Real> state) const {
        alignas(64) Real delta[W], delta_u[W], y[W], buffers[4][W];
        for (int64_t t = first; t < end; ++t) {
            if (call.borders && t > first && t % in.chunk == 0) save(t / in.chunk, state.hi);
            const Real *u = this->row(in.u, t, buffers[0]), *pre = this->row(in.delta_pre, t, buffers[1]);
            for (int k = 0; k < K; ++k) {
                const V step = Softplus<V>(with_bias<Real, K>(pre, bias, k)).value;
                store(step, delta + k * L);
                store(step * load(u + k * L), delta_u + k * L);
            }
            advance<Real, K, false, kCareful>(in.N, rate, W, delta, delta_u, in.B.at(b, t), in.C.at(b, t), state,
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
        Real *to = call.borders + (b * in.num_chunks() + chunk) * in.N * in.channels + d;
        for (int64_t j = 0; j < in.N; ++j)
            for (int64_t i = 0; i < n; ++i) to[j * in.channels + i] = hi[j * W + i];
    }
};

// ---------------------------------------------------------------------------------------------------------
// Backward: chunks from the last to the first; in a chunk all tiles of a group; in a tile the states of the chunk's
// steps are recomputed, and then their adjoints from the last step to the first.
//
//     g[t] = dy[t] C[t] + a[t+1] g[t+1]
//     dC[t] = sum_channels dy h;  dB[t] = sum_channels g delta u;  d(delta u) = sum_n g B;  d(delta A) = a g h_prev

// A group of channels' carry from chunk to chunk, N rows of all its channels each, and a chunk's part of dA.
template <class Real> struct Group {
    Real *rate;          // A log2(e)
    Pair<Real> carry;    // a[t+1] g[t+1]
    Real *drate;
    Group from(int64_t channel) const {
        return {rate + channel, {carry.hi + channel, carry.lo + channel}, drate + channel};
    }
};

// A tile's arrays for a chunk. W: channels of a tile; S: steps of a chunk.
template <class Real> struct Chunk {
    Real *states, *rests;                // (1 + S, N, W), the first before the chunk, and (S, N, W)
    Real *delta, *slope, *delta_u, *dy;  // (S, W); slope: of delta as a function of delta_pre
    Pair<Real> state;                    // (N, W)
    Real *zeros;                         // (N, W)
    Real *dB, *dC;                       // (S, N, lanes), to be summed over the lanes: all tiles of a group add to them
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
        for (int64_t i = 0; i < n; ++i) call.dskip[b * in.channels + d + i] += static_cast<double>(dskip[i]);
    }

  private:
    void start() const {
        const Real *border = call.borders + (b * in.num_chunks() + begin / in.chunk) * in.N * in.channels + d;
        clear(chunk.state.lo, in.N * W);
        for (int64_t j = 0; j < in.N; ++j)
            for (int64_t i = 0; i < W; ++i)
                chunk.state.hi[j * W + i] = chunk.states[j * W + i] = i < n ? border[j * in.channels + i] : Real(0);
    }

    // Whether all states were finite.
    template <bool kCareful> bool recompute() const {
        start();
        bool finite = true;
        for (int64_t t = begin; t < end; ++t) {
            if (in.reset.at(b, t)) {
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
        Real *delta = chunk.delta + s * W, *slope = chunk.slope + s * W, *delta_u = chunk.delta_u + s * W;
        for (int k = 0; k < K; ++k) {
            const Softplus<V> step(with_bias<Real, K>(pre, bias, k));
            store(step.value, delta + k * L);
            store(step.slope, slope + k * L);
            store(step.value * load(u + k * L), delta_u + k * L);
        }
        advance<Real, K, true, kCareful>(in.N, group.rate, stride, delta, delta_u, in.B.at(b, t), in.C.at(b, t),
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

    // Whether all that the adjoints are computed from is finite.
    bool finite_adjoints() const {
        Real sum = 0;  // NaN, once an element is not finite
        for (int64_t t = begin; t < end; ++t)
            for (int64_t j = 0; j < in.N; ++j) sum += in.C.at(b, t)[j] * 0;
        bool finite = sum == 0 && all_finite(chunk.dy, (end - begin) * W);
        for (int64_t j = 0; j < in.N; ++j) finite &= all_finite(group.carry.hi + j * stride, W);
        return finite;
    }

    template <bool kCareful> void adjoin(int64_t t, Real *dskip) const {
        const int64_t s = t - begin, size = in.N * W;
        const bool resets = in.reset.at(b, t);
        alignas(64) Real by_rate[W], by_delta_u[W], buffers[3][W];
        sweep<kCareful>(s, in.B.at(b, t), in.C.at(b, t), resets ? chunk.zeros : chunk.states + s * size, by_rate,
                        by_delta_u);
        if (resets) forget();
        const Real *u = this->row(in.u, t, buffers[0]), *dy = chunk.dy + s * W;
        Real *du = this->target(call.du, t, buffers[1]), *ddelta_pre = this->target(call.ddelta_pre, t, buffers[2]);
        for (int k = 0; k < K; ++k) {
            const V of_delta_u = load(by_delta_u + k * L), u_k = load(u + k * L), dy_k = load(dy + k * L);
            const V of_delta = load(by_rate + k * L) * Real(kLn2) + of_delta_u * u_k;
            store(of_delta * load(chunk.slope + s * W + k * L), ddelta_pre + k * L);
            V of_u = of_delta_u * load(chunk.delta + s * W + k * L);
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
    MINRNN_INLINE void sweep(int64_t s, const Real *B, const Real *C, const Real *before, Real *by_rate,
                             Real *by_delta_u) const {
        const Real *after = chunk.states + (s + 1) * in.N * W, *rests = chunk.rests + s * in.N * W;
        Real *const dB = chunk.dB + s * in.N * L, *const dC = chunk.dC + s * in.N * L;
        V dy[K], delta[K], delta_u[K], of_rate[K], of_delta_u[K];
        for (int k = 0; k < K; ++k) {
            dy[k] = load(chunk.dy + s * W + k * L);
            delta[k] = load(chunk.delta + s * W + k * L);
            delta_u[k] = load(chunk.delta_u + s * W + k * L);
            of_rate[k] = of_delta_u[k] = V{};
        }
        for (int64_t j = 0; j < in.N; ++j) {
            V of_B = load(dB + j * L), of_C = load(dC + j * L);
            for (int k = 0; k < K; ++k) {
                const int64_t at = j * W + k * L, there = j * stride + k * L;
                const V carried = load(group.carry.hi + there), rate = load(group.rate + there);
                V g, low{};
                if constexpr (sizeof(Real) == sizeof(float)) {
                    const V change = dy[k] * C[j] + load(group.carry.lo + there);
                    g = carried + change;
                    low = change - (g - carried);
                } else {
                    g = dy[k] * C[j] + carried;
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
                of_C += dy[k] * load(after + at);
                of_B += g * delta_u[k];
                of_delta_u[k] += g * B[j];
                of_rate[k] += of_exponent * rate;
                store(load(group.drate + there) + of_exponent * delta[k], group.drate + there);
            }
            store(of_B, dB + j * L);
            store(of_C, dC + j * L);
        }
        for (int k = 0; k < K; ++k) {
            store(of_rate[k], by_rate + k * L);
            store(of_delta_u[k], by_delta_u + k * L);
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
        for (Real **part : {&chunk.delta, &chunk.slope, &chunk.delta_u, &chunk.dy}) *part = take(S * W);
        for (Real **part : {&chunk.state.hi, &chunk.state.lo, &chunk.zeros}) *part = take(N * W);
        for (Real **part : {&chunk.dB, &chunk.dC}) *part = take(S * N * L);
    }

    void run() const {
        const int64_t N = in.N, states = (b * in.channels + d) * N;
        gather(n, N, in.A + d * N, Real(kLog2E), group.rate, stride);
        gather(n, N, call.dlast + states, Real(1), group.carry.hi, stride);
        clear(group.carry.lo, N * stride);
        clear(chunk.zeros, N * W);
        clear(call.dskip + b * in.channels + d, n);
        for (int64_t j = 0; j < N; ++j) clear(call.dA + (b * N + j) * in.channels + d, n);
        for (int64_t c = in.num_chunks() - 1; c >= 0; --c) {
            const int64_t begin = c * in.chunk, end = begin + in.chunk < in.T ? begin + in.chunk : in.T;
            clear(chunk.dB, in.chunk * N * L);
            clear(chunk.dC, in.chunk * N * L);
            clear(group.drate, N * stride);
            for (int64_t first = 0; first < n;) {
                const int64_t vectors = (stride - first) / L;
                first += vectors >= 4 ? run_tile<4>(first, begin, end)
                                      : (vectors >= 2 ? run_tile<2>(first, begin, end) : run_tile<1>(first, begin, end));
            }
            const int64_t row = ((index * in.batch + b) * in.T + begin) * N;
            add_lanes((end - begin) * N, chunk.dB, call.dB + row);
            add_lanes((end - begin) * N, chunk.dC, call.dC + row);
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
            double *to = call.dA + (b * in.N + j) * in.channels + d;
            for (int64_t i = 0; i < n; ++i) to[i] += static_cast<double>(group.drate[j * stride + i]);
        }
    }
};

// ---------------------------------------------------------------------------------------------------------
// The table

// While one exists, subnormal results and operands are zero. A state that decays without input, and the adjoint of steps
// that no loss depends on, would stay subnormal, at 100 cycles an operation on some processors.
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
