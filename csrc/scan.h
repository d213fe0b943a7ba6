// The loops over batch, channels and time. Knows pointers, sizes and strides; nothing of Python or torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "rows.h"

namespace minrnn {

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

// A (B, T, D) array whose channels are contiguous; strides count elements.
template <class IO> struct Sequence {
    IO *data;
    int64_t stride_b, stride_t;
    IO *row(int64_t b, int64_t t, int64_t d) const { return data + b * stride_b + t * stride_t + d; }
};

// A (B, D) array whose channels are contiguous.
template <class Real> struct States {
    Real *data;
    int64_t stride_b;
};

struct Resets {  // (B, T) bytes, or null
    const uint8_t *data;
    int64_t stride_b, stride_t;
    bool at(int64_t b, int64_t t) const { return data && data[b * stride_b + t * stride_t]; }
};

template <class IO> struct Problem {
    using Real = std::conditional_t<std::is_same_v<IO, double>, double, float>;
    int64_t B, T, D;
    int gate, candidate, num_pre, threads;
    bool reverse;
    Sequence<const IO> pre[3];
    States<const Real> h0;  // null: zeros
    Resets reset;
    // k counts steps in the order of the recurrence; time(k) is where that step lies in memory.
    int64_t time(int64_t k) const { return reverse ? T - 1 - k : k; }
};

constexpr int64_t kMaxTile = 512;       // channels at once: keeps every row buffer in the first-level cache
constexpr int64_t kMinTile = 32;        // below two cache lines a row, reads no longer stream
constexpr int64_t kMinChunk = 512;      // steps at once: a chunk must outweigh the cost of its prefix
constexpr int64_t kSerialBelow = 32768; // elements: starting threads costs more than this much work

// Rows of 16-bit numbers pass through a float buffer; others are used where they lie.
template <class IO> struct RowAccess {
    static const IO *load(const RowTable &, const IO *row, int64_t, IO *) { return row; }
    static IO *target(IO *row, IO *) { return row; }
    static void store(const RowTable &, const IO *, int64_t, IO *) {}
};

template <> struct RowAccess<bfloat16> {
    static const float *load(const RowTable &rows, const bfloat16 *row, int64_t n, float *buffer) {
        rows.widen_bfloat16(n, &row->bits, buffer);
        return buffer;
    }
    static float *target(bfloat16 *, float *buffer) { return buffer; }
    static void store(const RowTable &rows, const float *buffer, int64_t n, bfloat16 *row) {
        rows.narrow_bfloat16(n, buffer, &row->bits);
    }
};

template <> struct RowAccess<float16> {
    static const float *load(const RowTable &rows, const float16 *row, int64_t n, float *buffer) {
        rows.widen_float16(n, &row->bits, buffer);
        return buffer;
    }
    static float *target(float16 *, float *buffer) { return buffer; }
    static void store(const RowTable &rows, const float *buffer, int64_t n, float16 *row) {
        rows.narrow_float16(n, buffer, &row->bits);
    }
};

inline const RowKernels<float> &kernels(const RowTable &rows, int gate, int candidate, float) {
    return rows.single[gate][candidate];
}
inline const RowKernels<double> &kernels(const RowTable &rows, int gate, int candidate, double) {
    return rows.full[gate][candidate];
}

// How B x D x T is cut: `tiles` of `width` channels, and `chunks` of `length` steps. Time is cut only where
// batch and channels alone cannot occupy the threads, because it costs a second reading of the input.
struct Partition {
    int64_t width, tiles, length, chunks;
    int threads;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Partition partition(int64_t B, int64_t T, int64_t D, int threads) {
    if (B * T * D < kSerialBelow) threads = 1;
    const int64_t tiles_wanted = std::max<int64_t>(ceil_div(D, kMaxTile), ceil_div(2 * threads, B));
    int64_t width = threads == 1 ? std::min(D, kMaxTile) : ceil_div(ceil_div(D, tiles_wanted), 16) * 16;
    width = std::min(D, std::max(width, kMinTile));
    const int64_t tiles = ceil_div(D, width), units = B * tiles;
    int64_t chunks = 1;
    if (units < threads) chunks = std::max<int64_t>(1, std::min(ceil_div(2 * threads, units), T / kMinChunk));
    const int64_t length = ceil_div(T, chunks);
    return {width, tiles, length, ceil_div(T, length), threads};
}

template <class Real> struct RowBuffers {  // uninitialised on purpose: only 16-bit inputs use them
    alignas(64) Real pre[3][kMaxTile], h_prev[kMaxTile], dh[kMaxTile], out[3][kMaxTile];
};

// One tile of one batch row: channels [d, d + n) of batch b, steps [begin, end).
struct Tile {
    int64_t b, d, n, begin, end;
};

template <class IO> class Sweep {
  public:
    using Real = typename Problem<IO>::Real;
    Sweep(const Problem<IO> &problem, const RowTable &rows)
        : p(problem), rows(rows), row(kernels(rows, p.gate, p.candidate, Real())) {}

  protected:
    const Problem<IO> &p;
    const RowTable &rows;
    const RowKernels<Real> &row;

    struct Pre {
        const Real *p0, *p1, *p2;
    };

    Pre load_pre(const Tile &tile, int64_t t, RowBuffers<Real> &buffers) const {
        const Real *loaded[3] = {nullptr, nullptr, nullptr};
        for (int j = 0; j < p.num_pre; ++j)
            loaded[j] = load(p.pre[j], tile, t, buffers.pre[j]);
        return {loaded[0], loaded[1], loaded[2]};
    }

    const Real *load(const Sequence<const IO> &sequence, const Tile &tile, int64_t t, Real *buffer) const {
        return RowAccess<IO>::load(rows, sequence.row(tile.b, t, tile.d), tile.n, buffer);
    }
};

template <class IO> class Forward : Sweep<IO> {
    using typename Sweep<IO>::Real;
    using typename Sweep<IO>::Pre;
    using Sweep<IO>::p;
    using Sweep<IO>::rows;
    using Sweep<IO>::row;
    Sequence<IO> h;

  public:
    Forward(const Problem<IO> &problem, const RowTable &rows, Sequence<IO> h) : Sweep<IO>(problem, rows), h(h) {}

    void initial(const Tile &tile, double *carry) const {
        const Real *h0 = p.h0.data ? p.h0.data + tile.b * p.h0.stride_b + tile.d : nullptr;
        for (int64_t d = 0; d < tile.n; ++d) carry[d] = h0 ? static_cast<double>(h0[d]) : 0.0;
    }

    void prefix(const Tile &tile, double *carry, double *decay) const {
        RowBuffers<Real> buffers;
        for (int64_t k = tile.begin; k < tile.end; ++k) {
            const int64_t t = p.time(k);
            if (p.reset.at(tile.b, t)) {
                std::fill_n(carry, tile.n, 0.0);
                std::fill_n(decay, tile.n, 0.0);
            }
            const Pre pre = this->load_pre(tile, t, buffers);
            row.forward_prefix(tile.n, pre.p0, pre.p1, pre.p2, carry, decay);
        }
    }

    void run(const Tile &tile, double *carry) const {
        RowBuffers<Real> buffers;
        for (int64_t k = tile.begin; k < tile.end; ++k) {
            const int64_t t = p.time(k);
            if (p.reset.at(tile.b, t)) std::fill_n(carry, tile.n, 0.0);
            const Pre pre = this->load_pre(tile, t, buffers);
            IO *out = h.row(tile.b, t, tile.d);
            Real *target = RowAccess<IO>::target(out, buffers.out[0]);
            row.forward(tile.n, pre.p0, pre.p1, pre.p2, carry, target);
            RowAccess<IO>::store(rows, target, tile.n, out);
        }
    }

    void finish(const Tile &, const double *) const {}
};

// Steps run from the last to the first. On entry to step k the carry is a[k+1] * adjoint[k+1].
template <class IO> class Backward : Sweep<IO> {
    using typename Sweep<IO>::Real;
    using typename Sweep<IO>::Pre;
    using Sweep<IO>::p;
    using Sweep<IO>::rows;
    using Sweep<IO>::row;
    Sequence<const IO> dh, h;
    Sequence<IO> dpre[3];
    States<Real> dh0;

  public:
    Backward(const Problem<IO> &problem, const RowTable &rows, Sequence<const IO> dh, Sequence<const IO> h,
             const Sequence<IO> (&dpre)[3], States<Real> dh0)
        : Sweep<IO>(problem, rows), dh(dh), h(h), dpre{dpre[0], dpre[1], dpre[2]}, dh0(dh0) {}

    void initial(const Tile &tile, double *carry) const { std::fill_n(carry, tile.n, 0.0); }

    void prefix(const Tile &tile, double *carry, double *decay) const {
        RowBuffers<Real> buffers;
        for (int64_t k = last(tile); k >= first(tile); --k) {
            const int64_t t = p.time(k);
            const Pre pre = this->load_pre(tile, t, buffers);
            const Real *dh_row = this->load(dh, tile, t, buffers.dh);
            row.backward_prefix(tile.n, pre.p0, pre.p1, pre.p2, dh_row, carry, decay);
            if (p.reset.at(tile.b, t)) {
                std::fill_n(carry, tile.n, 0.0);
                std::fill_n(decay, tile.n, 0.0);
            }
        }
    }

    void run(const Tile &tile, double *carry) const {
        RowBuffers<Real> buffers;
        for (int64_t k = last(tile); k >= first(tile); --k) {
            const int64_t t = p.time(k);
            const bool reset = p.reset.at(tile.b, t);
            const Pre pre = this->load_pre(tile, t, buffers);
            const Real *dh_row = this->load(dh, tile, t, buffers.dh);
            Real *out[3] = {nullptr, nullptr, nullptr};
            for (int j = 0; j < p.num_pre; ++j)
                out[j] = RowAccess<IO>::target(dpre[j].row(tile.b, t, tile.d), buffers.out[j]);
            row.backward(tile.n, pre.p0, pre.p1, pre.p2, previous(tile, k, reset, buffers.h_prev), dh_row, carry,
                         out[0], out[1], out[2]);
            for (int j = 0; j < p.num_pre; ++j)
                RowAccess<IO>::store(rows, out[j], tile.n, dpre[j].row(tile.b, t, tile.d));
            if (reset) std::fill_n(carry, tile.n, 0.0);
        }
    }

    void finish(const Tile &tile, const double *carry) const {
        Real *out = dh0.data + tile.b * dh0.stride_b + tile.d;
        for (int64_t d = 0; d < tile.n; ++d) out[d] = static_cast<Real>(carry[d]);
    }

  private:
    // Tiles count steps in the order in which they run, here from the end of the recurrence.
    int64_t last(const Tile &tile) const { return p.T - 1 - tile.begin; }
    int64_t first(const Tile &tile) const { return p.T - tile.end; }

    const Real *previous(const Tile &tile, int64_t k, bool reset, Real *buffer) const {
        if (!reset && k > 0) return this->load(h, tile, p.time(k - 1), buffer);
        if (!reset && p.h0.data) return p.h0.data + tile.b * p.h0.stride_b + tile.d;
        std::fill_n(buffer, tile.n, Real(0));
        return buffer;
    }
};

// Runs a sweep over all tiles. Where time is cut, a first pass finds each chunk's prefix (product of decays,
// end state from zero), the prefixes are joined in order, and the second pass starts each chunk from its carry.
template <class Pass> void run(const Pass &pass, int64_t B, int64_t T, int64_t D, int requested_threads) {
    const Partition cut = partition(B, T, D, requested_threads);
    const int64_t units = B * cut.tiles;
    const auto tile_of = [&](int64_t unit, int64_t chunk) -> Tile {
        const int64_t d = (unit % cut.tiles) * cut.width;
        return {unit / cut.tiles, d, std::min(cut.width, D - d), chunk * cut.length,
                std::min(T, (chunk + 1) * cut.length)};
    };
    if (cut.chunks == 1) {
#pragma omp parallel for num_threads(cut.threads) schedule(dynamic, 1) if (cut.threads > 1)
        for (int64_t unit = 0; unit < units; ++unit) {
            alignas(64) double carry[kMaxTile];
            const Tile tile = tile_of(unit, 0);
            pass.initial(tile, carry);
            pass.run(tile, carry);
            pass.finish(tile, carry);
        }
        return;
    }
    const int64_t jobs = units * cut.chunks;
    std::vector<double> carries(jobs * cut.width, 0.0), decays(jobs * cut.width, 1.0);
#pragma omp parallel for num_threads(cut.threads) schedule(dynamic, 1)
    for (int64_t job = 0; job < jobs; ++job) {
        const int64_t unit = job / cut.chunks, chunk = job % cut.chunks;
        if (chunk + 1 < cut.chunks)  // nobody needs the last chunk's prefix
            pass.prefix(tile_of(unit, chunk), &carries[job * cut.width], &decays[job * cut.width]);
    }
    for (int64_t unit = 0; unit < units; ++unit) {
        std::vector<double> carry(cut.width);
        pass.initial(tile_of(unit, 0), carry.data());
        for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) {
            double *end = &carries[(unit * cut.chunks + chunk) * cut.width];
            const double *decay = &decays[(unit * cut.chunks + chunk) * cut.width];
            for (int64_t d = 0; d < cut.width; ++d) {
                const double entering = carry[d];
                // A reset inside the chunk forgets everything before it, infinities and NaN included.
                carry[d] = decay[d] == 0.0 ? end[d] : decay[d] * entering + end[d];
                end[d] = entering;
            }
        }
    }
#pragma omp parallel for num_threads(cut.threads) schedule(dynamic, 1)
    for (int64_t job = 0; job < jobs; ++job) {
        const int64_t chunk = job % cut.chunks;
        const Tile tile = tile_of(job / cut.chunks, chunk);
        double *carry = &carries[job * cut.width];
        pass.run(tile, carry);
        if (chunk + 1 == cut.chunks) pass.finish(tile, carry);
    }
}

}  // namespace minrnn
