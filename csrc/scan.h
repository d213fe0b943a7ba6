// The loops over batch, channels and time. Independent of Python and torch: pointers, sizes and strides.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "arrays.h"
#include "rows.h"
#include "threads.h"

namespace minrnn {

template <class IO> struct Problem {
    using Real = typename Computed<IO>::Real;
    int64_t B, T, D;
    int threads;
    bool reverse;
    const RowKernels<IO> &kernels;
    Sequence<const IO> pre[3];
    States<const Real> h0;  // null: zeros
    Resets reset;
};

constexpr int64_t kMaxTile = 2048;      // channels at once: a row's carry stays in the nearest caches
constexpr int64_t kMinTile = 64;        // channels: four cache lines; narrower rows are bound by latency
constexpr int64_t kLookback = 128;      // steps at a chunk's end from which its prefix is first computed
constexpr double kForgotten = 0x1p-64;  // a product of decays below which a state has no effect

// How B x D x T is divided. `tiles` of `width` channels: as few as fit, because a row that is read in parts is read at half
// the speed or less (measured: 16 GB/s at the full width of 512, 8 at 256, 7 at 64). Where batch and tiles cannot occupy
// the threads, time is divided as well, into `chunks` of `length` steps.
struct Partition {
    int64_t width, tiles, length, chunks;
    int threads;
};

inline Partition partition(int64_t B, int64_t T, int64_t D, int threads) {
    if (B * T * D < kSerialBelow) threads = 1;
    const auto width_of = [&](int64_t tiles) { return std::min(D, ceil_div(ceil_div(D, tiles), 16) * 16); };
    int64_t width = width_of(ceil_div(D, kMaxTile)), tiles = ceil_div(D, width);
    if (B * tiles >= threads) return {width, tiles, T, 1, threads};
    const int64_t length = ceil_div(T, ceil_div(threads, B * tiles));
    if (length >= 4 * kLookback) return {width, tiles, length, ceil_div(T, length), threads};
    width = std::min(D, std::max(kMinTile, width_of(ceil_div(threads, B))));
    return {width, ceil_div(D, width), T, 1, threads};
}

// One tile of one batch row: channels [d, d + n) of batch b, steps [begin, end) in the order of the pass.
struct Tile {
    int64_t b, d, n, begin, end;
};

// A tile's carry from step to step.
template <class Real> struct TileCarry {
    alignas(64) Real hi[kMaxTile], lo[kMaxTile];
    CarryRow<Real> row() { return {hi, lo}; }
};

template <class Real> void fill(CarryRow<Real> row, int64_t n, Real value) {
    std::fill_n(row.hi, n, value);
    std::fill_n(row.lo, n, Real(0));
}

template <class Real> void copy(CarryRow<Real> from, int64_t n, CarryRow<Real> to) {
    std::copy_n(from.hi, n, to.hi);
    std::copy_n(from.lo, n, to.lo);
}

#define MINRNN_APART __attribute__((noinline))  // rare paths must not enlarge the stack of the usual one

// Recomputes a run of steps in the channels whose carry did not stay finite, one step after another, in double. The
// kernels split a step of a pair of floats into terms that cancel, so an infinity becomes NaN; here they compute only a
// step's decay a and input term b. Only results that are not finite are written again: none depends on later steps.
template <class IO> class Again {
    using Real = typename Computed<IO>::Real;
    const RowKernels<IO> &kernels;
    const int64_t n;
    int64_t channels[kMaxTile], count = 0;
    double state[kMaxTile];
    TileCarry<Real> decay, input, from;
    alignas(64) IO to[3][kMaxTile], zeros[kMaxTile] = {};

    void write(IO *row, const IO *values) const {
        for (int64_t i = 0; i < count; ++i)
            if (!std::isfinite(widened(row[channels[i]]))) row[channels[i]] = values[channels[i]];
    }

    static void put(CarryRow<Real> row, int64_t d, double x) {
        row.hi[d] = static_cast<Real>(x);
        row.lo[d] = std::isfinite(row.hi[d]) ? static_cast<Real>(x - double(row.hi[d])) : Real(0);
    }

    double a(int64_t d) const { return double(decay.hi[d]) + (std::isfinite(decay.lo[d]) ? double(decay.lo[d]) : 0); }

  public:
    // start, end: the carry before and after the run.
    Again(const RowKernels<IO> &kernels, int64_t n, CarryRow<Real> start, CarryRow<Real> end) : kernels(kernels), n(n) {
        fill(from.row(), n, Real(0));
        for (int64_t d = 0; d < n; ++d) {
            if (std::isfinite(end.hi[d])) continue;
            channels[count++] = d;
            state[d] = double(start.hi[d]) + (std::isfinite(start.hi[d]) ? double(start.lo[d]) : 0);
        }
    }

    void forward(const typename RowKernels<IO>::Pre &pre, IO *h) {
        recurrence(pre);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t d = channels[i];
            const double kept = a(d) * state[d];
            state[d] = std::isinf(a(d)) ? kept : kept + double(input.hi[d]);  // b cannot be separated from it
            put(from.row(), d, state[d]);
        }
        kernels.round(n, from.hi, to[0]);
        write(h, to[0]);
    }

    void backward(const typename RowKernels<IO>::Pre &pre, Rows<const IO> h_prev, const IO *dh,
                  const typename RowKernels<IO>::Gradients &dpre) {
        for (int64_t i = 0; i < count; ++i) {
            const int64_t d = channels[i];
            state[d] += double(widened(dh[d]));
            put(from.row(), d, state[d]);
        }
        const Rows<IO> into[3] = {{to[0], 0}, {to[1], 0}, {to[2], 0}};
        kernels.backward(n, 1, pre, h_prev, {zeros, 0}, from.row(), into);
        for (int j = 0; j < 3; ++j)
            if (dpre[j].first) write(dpre[j].first, to[j]);
        recurrence(pre);
        for (int64_t i = 0; i < count; ++i) state[channels[i]] *= a(channels[i]);
    }

    void finish(CarryRow<Real> end) const {
        for (int64_t i = 0; i < count; ++i) put(end, channels[i], state[channels[i]]);
    }

  private:
    void recurrence(const typename RowKernels<IO>::Pre &pre) {
        fill(input.row(), n, Real(0));
        fill(decay.row(), n, Real(1));
        kernels.forward_prefix(n, 1, pre, input.row(), decay.row());
    }
};

// A pass over time: its direction, and the rows of a tile from step k of the pass on.
template <class IO> class Pass {
  public:
    using Real = typename Problem<IO>::Real;
    using Carry = CarryRow<Real>;
    bool finite(const Tile &tile, Carry carry) const { return kernels.finite(tile.n, carry.hi); }

  protected:
    const Problem<IO> &p;
    const RowKernels<IO> &kernels;
    const bool falling;  // through memory

    Pass(const Problem<IO> &problem, bool falling) : p(problem), kernels(p.kernels), falling(falling) {}

    int64_t time(int64_t k) const { return falling ? p.T - 1 - k : k; }
    bool reset(const Tile &tile, int64_t k) const { return p.reset.at(tile.b, time(k)); }

    template <class X> Rows<X> rows(const Sequence<X> &x, const Tile &tile, int64_t k) const {
        if (!x.data) return {nullptr, 0};
        return {x.at(tile.b, time(k)) + tile.d, falling ? -x.stride_t : x.stride_t};
    }

    // Three at once, as kernels take them.
    template <class X> struct Three {
        Rows<X> of[3];
    };
    template <class X> Three<X> three(const Sequence<X> (&x)[3], const Tile &tile, int64_t k) const {
        return {{rows(x[0], tile, k), rows(x[1], tile, k), rows(x[2], tile, k)}};
    }

    // The end of the run of steps from k on that holds no reset after its first step.
    int64_t run_end(const Tile &tile, int64_t k) const {
        if (!p.reset.data) return tile.end;
        do ++k;
        while (k < tile.end && !reset(tile, k));
        return k;
    }
};

template <class IO> class Forward : public Pass<IO> {
    using Pass<IO>::p;
    using Pass<IO>::kernels;
    Sequence<IO> h;

  public:
    using typename Pass<IO>::Real;
    using typename Pass<IO>::Carry;
    Forward(const Problem<IO> &problem, Sequence<IO> h) : Pass<IO>(problem, problem.reverse), h(h) {}

    void initial(const Tile &tile, Carry carry) const {
        fill(carry, tile.n, Real(0));
        if (p.h0.data) std::copy_n(p.h0.data + tile.b * p.h0.stride_b + tile.d, tile.n, carry.hi);
    }

    void run(const Tile &tile, Carry carry) const {
        TileCarry<Real> start;
        copy(carry, tile.n, start.row());
        for (int64_t k = tile.begin, end; k < tile.end; k = end) {
            end = this->run_end(tile, k);
            const bool fresh = this->reset(tile, k);
            if (fresh) fill(carry, tile.n, Real(0));
            kernels.forward(tile.n, end - k, this->three(p.pre, tile, k).of, carry, this->rows(h, tile, k));
            if (this->finite(tile, carry)) continue;
            if (fresh) fill(start.row(), tile.n, Real(0));
            run_again(tile, k, end, start.row(), carry);
        }
    }

    void prefix(const Tile &tile, Carry carry, Carry decay) const {
        for (int64_t k = tile.begin, end; k < tile.end; k = end) {
            end = this->run_end(tile, k);
            if (this->reset(tile, k)) {
                fill(carry, tile.n, Real(0));
                fill(decay, tile.n, Real(0));
            }
            kernels.forward_prefix(tile.n, end - k, this->three(p.pre, tile, k).of, carry, decay);
        }
    }

    void finish(const Tile &, Carry) const {}

  private:
    MINRNN_APART void run_again(const Tile &tile, int64_t k, int64_t end, Carry start, Carry carry) const {
        Again<IO> again(kernels, tile.n, start, carry);
        for (; k < end; ++k) again.forward(this->three(p.pre, tile, k).of, this->rows(h, tile, k).first);
        again.finish(carry);
    }
};

// Steps run from the recurrence's last to its first. On entry to a step the carry is a * adjoint of the step after it.
template <class IO> class Backward : public Pass<IO> {
    using Pass<IO>::p;
    using Pass<IO>::kernels;
    Sequence<const IO> dh, h;
    Sequence<IO> dpre[3];
    States<typename Pass<IO>::Real> dh0;

  public:
    using typename Pass<IO>::Real;
    using typename Pass<IO>::Carry;
    Backward(const Problem<IO> &problem, Sequence<const IO> dh, Sequence<const IO> h, const Sequence<IO> (&dpre)[3],
             States<Real> dh0)
        : Pass<IO>(problem, !problem.reverse), dh(dh), h(h), dpre{dpre[0], dpre[1], dpre[2]}, dh0(dh0) {}

    void initial(const Tile &tile, Carry carry) const { fill(carry, tile.n, Real(0)); }

    void run(const Tile &tile, Carry carry) const {
        alignas(64) IO buffer[kMaxTile];
        TileCarry<Real> start;
        copy(carry, tile.n, start.row());
        for (int64_t k = tile.begin, since = k, end; k < tile.end; k = end) {
            end = starts(tile, k) ? k + 1 : before_start(tile, k);
            kernels.backward(tile.n, end - k, this->three(p.pre, tile, k).of, before(tile, k, buffer),
                             this->rows(dh, tile, k), carry, this->three(dpre, tile, k).of);
            const bool forgets = this->reset(tile, k);
            if ((forgets || end == tile.end) && !this->finite(tile, carry))
                run_again(tile, since, end, start.row(), carry);
            if (!forgets) continue;
            fill(carry, tile.n, Real(0));
            fill(start.row(), tile.n, Real(0));
            since = end;
        }
    }

    void prefix(const Tile &tile, Carry carry, Carry decay) const {
        for (int64_t k = tile.begin, end; k < tile.end; k = end) {
            end = this->reset(tile, k) ? k + 1 : this->run_end(tile, k);
            kernels.backward_prefix(tile.n, end - k, this->three(p.pre, tile, k).of, this->rows(dh, tile, k), carry,
                                    decay);
            if (this->reset(tile, k)) {
                fill(carry, tile.n, Real(0));
                fill(decay, tile.n, Real(0));
            }
        }
    }

    void finish(const Tile &tile, Carry carry) const {
        std::copy_n(carry.hi, tile.n, dh0.data + tile.b * dh0.stride_b + tile.d);
    }

  private:
    // Whether step k of this pass starts from h0 or a reset, not from the step before it.
    bool starts(const Tile &tile, int64_t k) const { return k == p.T - 1 || this->reset(tile, k); }
    int64_t before_start(const Tile &tile, int64_t k) const {
        return std::min(this->run_end(tile, k), std::max(k + 1, p.T - 1));
    }

    // The states before the steps from step k on.
    Rows<const IO> before(const Tile &tile, int64_t k, IO *buffer) const {
        return starts(tile, k) ? Rows<const IO>{initial_state(tile, k, buffer), 0} : this->rows(h, tile, k + 1);
    }

    MINRNN_APART void run_again(const Tile &tile, int64_t k, int64_t end, Carry start, Carry carry) const {
        alignas(64) IO buffer[kMaxTile];
        Again<IO> again(kernels, tile.n, start, carry);
        for (; k < end; ++k)
            again.backward(this->three(p.pre, tile, k).of, before(tile, k, buffer), this->rows(dh, tile, k).first,
                           this->three(dpre, tile, k).of);
        again.finish(carry);
    }

    const IO *initial_state(const Tile &tile, int64_t k, IO *buffer) const {
        if (p.h0.data && !this->reset(tile, k))
            kernels.round(tile.n, p.h0.data + tile.b * p.h0.stride_b + tile.d, buffer);
        else
            std::fill_n(buffer, tile.n, IO(0));
        return buffer;
    }
};

// Doubles as pairs.
template <class Real> void write(const std::vector<double> &from, CarryRow<Real> row) {
    for (size_t d = 0; d < from.size(); ++d) {
        row.hi[d] = static_cast<Real>(from[d]);
        row.lo[d] = static_cast<Real>(from[d] - double(row.hi[d]));
    }
}

// The state at a chunk's border, in double.
class Border {
    std::vector<double> state;

  public:
    template <class Real> Border(CarryRow<Real> row, int64_t n) : state(n) {
        for (int64_t d = 0; d < n; ++d) state[d] = double(row.hi[d]) + double(row.lo[d]);
    }
    // Past a chunk that ends in `end` from the zero state, and over which the decays' product is `decay`.
    template <class Real> void pass(CarryRow<Real> end, CarryRow<Real> decay) {
        for (size_t d = 0; d < state.size(); ++d) {
            const double product = double(decay.hi[d]) + double(decay.lo[d]);
            const double from_zero = double(end.hi[d]) + double(end.lo[d]);
            // A reset inside the chunk forgets everything before it, infinities and NaN included.
            state[d] = product == 0.0 ? from_zero : product * state[d] + from_zero;
        }
    }
    template <class Real> void write(CarryRow<Real> row) const { minrnn::write(state, row); }
};

// A chunk's final state from a zero state and its product of decays, from as few of its last steps as determine them:
// most gates forget so fast that one or two hundred are enough. Otherwise more before them are read, each step once.
template <class P>
void find_prefix(const P &pass, const Tile &tile, CarryRow<typename P::Real> end, CarryRow<typename P::Real> decay) {
    using Real = typename P::Real;
    std::vector<double> states(tile.n, 0.0), products(tile.n, 1.0);
    Tile part = tile;
    for (int64_t steps = kLookback;; steps *= 2) {
        part.begin = std::max(tile.begin, part.end - steps);
        fill(end, tile.n, Real(0));
        fill(decay, tile.n, Real(1));
        pass.prefix(part, end, decay);
        bool all_forgotten = true;
        for (int64_t d = 0; d < tile.n; ++d) {
            // Where a reset is in later steps, these have no effect, infinities and NaN included.
            if (products[d] != 0.0) states[d] += products[d] * (double(end.hi[d]) + double(end.lo[d]));
            products[d] *= double(decay.hi[d]) + double(decay.lo[d]);
            all_forgotten = all_forgotten && std::abs(products[d]) < kForgotten;
        }
        if (part.begin == tile.begin || all_forgotten) break;
        part.end = part.begin;
    }
    write(states, end);
    write(products, decay);
}

// The chunks of all units, with two rows for each: its final state from a zero state, and its product of decays.
template <class P> class Prefixes {
    using Real = typename P::Real;
    const int64_t T, D;
    std::vector<Real> ends, decays;

    CarryRow<Real> row(std::vector<Real> &rows, int64_t job) {
        return {&rows[2 * job * cut.width], &rows[(2 * job + 1) * cut.width]};
    }

  public:
    const Partition cut;
    const int64_t units, jobs;

    Prefixes(int64_t B, int64_t T, int64_t D, const Partition &cut)
        : T(T), D(D), ends(2 * B * cut.tiles * cut.chunks * cut.width), decays(ends.size()), cut(cut),
          units(B * cut.tiles), jobs(units * cut.chunks) {}

    Tile tile(int64_t job) const {
        const int64_t unit = job / cut.chunks, chunk = job % cut.chunks, d = (unit % cut.tiles) * cut.width;
        return {unit / cut.tiles, d, std::min(cut.width, D - d), chunk * cut.length,
                std::min(T, (chunk + 1) * cut.length)};
    }
    CarryRow<Real> end(int64_t job) { return row(ends, job); }
    CarryRow<Real> decay(int64_t job) { return row(decays, job); }

    // Of the first `chunks` chunks of every unit.
    void find(const P &pass, int64_t chunks) {
        for_each(jobs, cut.threads, [&](int64_t job, int) {
            if (job % cut.chunks < chunks) find_prefix(pass, tile(job), end(job), decay(job));
        });
    }
};

// The prefix of all steps of a pass.
template <class P>
void run_prefix(const P &pass, int64_t B, int64_t T, int64_t D, int threads, States<typename P::Real> end,
                States<typename P::Real> decay) {
    using Real = typename P::Real;
    Prefixes<P> of(B, T, D, partition(B, T, D, threads));
    of.find(pass, of.cut.chunks);
    for (int64_t job = 0; job < of.jobs;) {
        const Tile tile = of.tile(job);
        TileCarry<Real> zero, one;
        fill(zero.row(), tile.n, Real(0));
        fill(one.row(), tile.n, Real(1));
        Border state(zero.row(), tile.n), product(one.row(), tile.n);
        for (int64_t chunk = 0; chunk < of.cut.chunks; ++chunk, ++job) {
            state.pass(of.end(job), of.decay(job));
            product.pass(zero.row(), of.decay(job));
        }
        state.write(zero.row());
        product.write(one.row());
        std::copy_n(zero.hi, tile.n, end.data + tile.b * end.stride_b + tile.d);
        std::copy_n(one.hi, tile.n, decay.data + tile.b * decay.stride_b + tile.d);
    }
}

// Runs the chunks of a unit's time in parallel, each from the state that the prefixes of the chunks before it give.
template <class P> void run_in_chunks(const P &pass, int64_t B, int64_t T, int64_t D, const Partition &cut) {
    using Real = typename P::Real;
    Prefixes<P> of(B, T, D, cut);
    of.find(pass, cut.chunks - 1);  // the last chunk's prefix is not needed
    const int64_t units = of.units, jobs = of.jobs;
    std::vector<char> unsure(jobs);  // whether a chunk's initial state may wrongly be NaN
    for (int64_t unit = 0; unit < units; ++unit) {
        const int64_t first = unit * cut.chunks;
        TileCarry<Real> initial;
        pass.initial(of.tile(first), initial.row());
        Border border(initial.row(), of.tile(first).n);
        for (int64_t job = first; job < first + cut.chunks; ++job) {
            const Border start = border;
            border.pass(of.end(job), of.decay(job));
            start.write(of.end(job));
            unsure[job] = !pass.finite(of.tile(job), of.end(job));
        }
    }
    for_each(jobs, cut.threads, [&](int64_t job, int) { pass.run(of.tile(job), of.end(job)); });
    for (int64_t job = 0; job < jobs; ++job) {
        const int64_t chunk = job % cut.chunks;
        // An infinity or a NaN is never forgotten, but a prefix computed from some of the steps may have missed it.
        if (chunk > 0 && (unsure[job] || !pass.finite(of.tile(job - 1), of.end(job - 1)))) {
            copy(of.end(job - 1), of.tile(job).n, of.end(job));
            pass.run(of.tile(job), of.end(job));
        }
        if (chunk + 1 == cut.chunks) pass.finish(of.tile(job), of.end(job));
    }
}

template <class P> void run(const P &pass, int64_t B, int64_t T, int64_t D, int threads) {
    const Partition cut = partition(B, T, D, threads);
    if (cut.chunks > 1) return run_in_chunks(pass, B, T, D, cut);
    for_each(B * cut.tiles, cut.threads, [&](int64_t unit, int) {
        const int64_t d = (unit % cut.tiles) * cut.width;
        const Tile tile{unit / cut.tiles, d, std::min(cut.width, D - d), 0, T};
        TileCarry<typename P::Real> carry;
        pass.initial(tile, carry.row());
        pass.run(tile, carry.row());
        pass.finish(tile, carry.row());
    });
}

}  // namespace minrnn
