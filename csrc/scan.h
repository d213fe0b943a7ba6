// The loops over batch, channels and time. Knows pointers, sizes and strides; nothing of Python or torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "rows.h"

namespace minrnn {

// A (B, T, D) array whose channels are contiguous; strides count elements.
template <class IO> struct Sequence {
    IO *data;
    int64_t stride_b, stride_t;
    IO *row(int64_t b, int64_t t, int64_t d) const { return data ? data + b * stride_b + t * stride_t + d : nullptr; }
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
    using Real = typename Computed<IO>::Real;
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

// One tile of one batch row: channels [d, d + n) of batch b, steps [begin, end) in the order in which they run.
struct Tile {
    int64_t b, d, n, begin, end;
};

// What a tile carries from step to step, kept in the first-level cache.
template <class Real> struct TileCarry {
    alignas(64) Real hi[kMaxTile], lo[kMaxTile];
    CarryRow<Real> row() { return {hi, lo}; }
};

template <class Real> void fill(CarryRow<Real> row, int64_t n, Real value) {
    std::fill_n(row.hi, n, value);
    std::fill_n(row.lo, n, Real(0));
}

template <class IO> class Sweep {
  public:
    using Real = typename Problem<IO>::Real;
    using Carry = CarryRow<Real>;
    Sweep(const Problem<IO> &problem, const RowTable &rows) : p(problem), kernels(rows.of(p.gate, p.candidate, IO())) {}

  protected:
    const Problem<IO> &p;
    const RowKernels<IO> &kernels;

    template <class X> struct Rows {
        X *at[3];
    };

    template <class X> Rows<X> rows(const Sequence<X> (&sequences)[3], const Tile &tile, int64_t t) const {
        return {{sequences[0].row(tile.b, t, tile.d), sequences[1].row(tile.b, t, tile.d),
                 sequences[2].row(tile.b, t, tile.d)}};
    }
};

template <class IO> class Forward : public Sweep<IO> {
    using Sweep<IO>::p;
    using Sweep<IO>::kernels;
    Sequence<IO> h;

  public:
    using typename Sweep<IO>::Real;
    using typename Sweep<IO>::Carry;
    Forward(const Problem<IO> &problem, const RowTable &rows, Sequence<IO> h) : Sweep<IO>(problem, rows), h(h) {}

    void initial(const Tile &tile, Carry carry) const {
        fill(carry, tile.n, Real(0));
        if (p.h0.data) std::copy_n(p.h0.data + tile.b * p.h0.stride_b + tile.d, tile.n, carry.hi);
    }

    void prefix(const Tile &tile, Carry carry, Carry decay) const {
        const Order order = p.reverse ? Order::kFalling : Order::kRising;
        for (int64_t k = tile.begin; k < tile.end; ++k) {
            const int64_t t = p.time(k);
            if (p.reset.at(tile.b, t)) {
                fill(carry, tile.n, Real(0));
                fill(decay, tile.n, Real(0));
            }
            kernels.forward_prefix(order, tile.n, this->rows(p.pre, tile, t).at, carry, decay);
        }
    }

    void run(const Tile &tile, Carry carry) const {
        const Order order = p.reverse ? Order::kFalling : Order::kRising;
        for (int64_t k = tile.begin; k < tile.end; ++k) {
            const int64_t t = p.time(k);
            if (p.reset.at(tile.b, t)) fill(carry, tile.n, Real(0));
            kernels.forward(order, tile.n, this->rows(p.pre, tile, t).at, carry, h.row(tile.b, t, tile.d));
        }
    }

    void finish(const Tile &, Carry) const {}
};

// Steps run from the last to the first. On entry to step k the carry is a[k+1] * adjoint[k+1].
template <class IO> class Backward : public Sweep<IO> {
    using Sweep<IO>::p;
    using Sweep<IO>::kernels;
    Sequence<const IO> dh, h;
    Sequence<IO> dpre[3];
    States<typename Sweep<IO>::Real> dh0;

  public:
    using typename Sweep<IO>::Real;
    using typename Sweep<IO>::Carry;
    Backward(const Problem<IO> &problem, const RowTable &rows, Sequence<const IO> dh, Sequence<const IO> h,
             const Sequence<IO> (&dpre)[3], States<Real> dh0)
        : Sweep<IO>(problem, rows), dh(dh), h(h), dpre{dpre[0], dpre[1], dpre[2]}, dh0(dh0) {}

    void initial(const Tile &tile, Carry carry) const { fill(carry, tile.n, Real(0)); }

    void prefix(const Tile &tile, Carry carry, Carry decay) const {
        const Order order = p.reverse ? Order::kRising : Order::kFalling;
        for (int64_t k = last(tile); k >= first(tile); --k) {
            const int64_t t = p.time(k);
            kernels.backward_prefix(order, tile.n, this->rows(p.pre, tile, t).at, dh.row(tile.b, t, tile.d), carry,
                                    decay);
            if (p.reset.at(tile.b, t)) {
                fill(carry, tile.n, Real(0));
                fill(decay, tile.n, Real(0));
            }
        }
    }

    void run(const Tile &tile, Carry carry) const {
        alignas(64) IO start[kMaxTile];
        const Order order = p.reverse ? Order::kRising : Order::kFalling;
        for (int64_t k = last(tile); k >= first(tile); --k) {
            const int64_t t = p.time(k);
            const bool reset = p.reset.at(tile.b, t);
            const IO *h_prev =
                k > 0 && !reset ? h.row(tile.b, p.time(k - 1), tile.d) : initial_state(tile, reset, start);
            kernels.backward(order, tile.n, this->rows(p.pre, tile, t).at, h_prev, dh.row(tile.b, t, tile.d), carry,
                             this->rows(dpre, tile, t).at);
            if (reset) fill(carry, tile.n, Real(0));
        }
    }

    void finish(const Tile &tile, Carry carry) const {
        std::copy_n(carry.hi, tile.n, dh0.data + tile.b * dh0.stride_b + tile.d);
    }

  private:
    int64_t last(const Tile &tile) const { return p.T - 1 - tile.begin; }
    int64_t first(const Tile &tile) const { return p.T - tile.end; }

    const IO *initial_state(const Tile &tile, bool reset, IO *buffer) const {
        if (p.h0.data && !reset)
            kernels.round(tile.n, p.h0.data + tile.b * p.h0.stride_b + tile.d, buffer);
        else
            std::fill_n(buffer, tile.n, IO(0));
        return buffer;
    }
};

// Turns each chunk's end state from zero into the state with which the chunk begins.
template <class Pass, class Carries, class Decays>
void join_prefixes(const Pass &pass, const Tile &tile, int64_t chunks, const Carries &carries, const Decays &decays) {
    using Real = typename Pass::Real;
    TileCarry<Real> start;
    pass.initial(tile, start.row());
    std::vector<double> state(tile.n);
    for (int64_t d = 0; d < tile.n; ++d) state[d] = double(start.hi[d]) + double(start.lo[d]);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const CarryRow<Real> end = carries(chunk), decay = decays(chunk);
        for (int64_t d = 0; d < tile.n; ++d) {
            const double entering = state[d], product = double(decay.hi[d]) + double(decay.lo[d]);
            const double from_zero = double(end.hi[d]) + double(end.lo[d]);
            // A reset inside the chunk forgets everything before it, infinities and NaN included.
            state[d] = product == 0.0 ? from_zero : product * entering + from_zero;
            end.hi[d] = static_cast<Real>(entering);
            end.lo[d] = static_cast<Real>(entering - double(end.hi[d]));
        }
    }
}

// Runs a sweep over all tiles. Where time is cut, a first pass finds each chunk's prefix (product of decays,
// end state from zero), the prefixes are joined in order, and the second pass starts each chunk from its carry.
template <class Pass> void run(const Pass &pass, int64_t B, int64_t T, int64_t D, int requested_threads) {
    using Real = typename Pass::Real;
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
            TileCarry<Real> carry;
            const Tile tile = tile_of(unit, 0);
            pass.initial(tile, carry.row());
            pass.run(tile, carry.row());
            pass.finish(tile, carry.row());
        }
        return;
    }
    const int64_t jobs = units * cut.chunks;
    std::vector<Real> carries(2 * jobs * cut.width), decays(2 * jobs * cut.width);
    const auto row_of = [&](std::vector<Real> &rows, int64_t job) -> CarryRow<Real> {
        return {&rows[2 * job * cut.width], &rows[(2 * job + 1) * cut.width]};
    };
#pragma omp parallel for num_threads(cut.threads) schedule(dynamic, 1)
    for (int64_t job = 0; job < jobs; ++job) {
        const int64_t unit = job / cut.chunks, chunk = job % cut.chunks;
        if (chunk + 1 == cut.chunks) continue;  // nobody needs the last chunk's prefix
        fill(row_of(decays, job), cut.width, Real(1));
        pass.prefix(tile_of(unit, chunk), row_of(carries, job), row_of(decays, job));
    }
    for (int64_t unit = 0; unit < units; ++unit)
        join_prefixes<Pass>(pass, tile_of(unit, 0), cut.chunks,
                            [&](int64_t chunk) { return row_of(carries, unit * cut.chunks + chunk); },
                            [&](int64_t chunk) { return row_of(decays, unit * cut.chunks + chunk); });
#pragma omp parallel for num_threads(cut.threads) schedule(dynamic, 1)
    for (int64_t job = 0; job < jobs; ++job) {
        const int64_t chunk = job % cut.chunks;
        const Tile tile = tile_of(job / cut.chunks, chunk);
        pass.run(tile, row_of(carries, job));
        if (chunk + 1 == cut.chunks) pass.finish(tile, row_of(carries, job));
    }
}

}  // namespace minrnn
