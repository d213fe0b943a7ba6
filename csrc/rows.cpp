// The innermost loops, compiled with -DMINRNN_ISA=<name> and that instruction set's flags.
#include "rows.h"

#include "gates.h"

namespace minrnn {
namespace {

template <class IO, class G> struct Rows {
    using Real = typename Computed<IO>::Real;
    using V = Lanes<Real>;
    using In = const IO *;
    using Out = IO *;
    using CarryRow = minrnn::CarryRow<Real>;
    using Pre = typename RowKernels<IO>::Pre;

    // One block of lanes of the arrays, beginning at channel d; Count is All, or a number of channels below that.
    template <class Count> struct Block {
        int64_t d;
        Count count;
        MINRNN_INLINE V from(In row) const { return load(row + d, count); }
        MINRNN_INLINE void to(Out row, V x) const { store(x, row + d, count); }
        MINRNN_INLINE V third(In row) const {
            if constexpr (G::num_pre > 2) return from(row);
            return V{};
        }
        MINRNN_INLINE Carry<V> from(CarryRow row) const { return {load(row.hi + d, count), load(row.lo + d, count)}; }
        MINRNN_INLINE void to(CarryRow row, Carry<V> carry) const {
            store(carry.hi, row.hi + d, count);
            store(carry.lo, row.lo + d, count);
        }
    };

    // Each kernel: `step` computes a block, `put` stores what it found.

    struct Forward {
        In p0, p1, p2;
        CarryRow carry;
        Out h;
        template <class B> MINRNN_INLINE Carry<V> step(B at) const {
            return advance(at.from(carry), G::forward(at.from(p0), at.from(p1), at.third(p2)));
        }
        template <class B> MINRNN_INLINE void put(B at, const Carry<V> &next) const {
            at.to(carry, next);
            at.to(h, next.hi);
        }
    };

    struct Prefix {
        Carry<V> state, product;
    };

    struct ForwardPrefix {
        In p0, p1, p2;
        CarryRow carry, decay;
        template <class B> MINRNN_INLINE Prefix step(B at) const {
            const Recurrence<V> r = G::forward(at.from(p0), at.from(p1), at.third(p2));
            return {advance(at.from(carry), r), multiply(at.from(decay), r.a)};
        }
        template <class B> MINRNN_INLINE void put(B at, const Prefix &next) const {
            at.to(carry, next.state);
            at.to(decay, next.product);
        }
    };

    struct Adjoint {
        Gradients<V> gradients;
        Carry<V> next;
    };

    struct Backward {
        In p0, p1, p2, h_prev, dh;
        CarryRow carry;
        Out d0, d1, d2;
        template <class B> MINRNN_INLINE Adjoint step(B at) const {
            const Carry<V> adjoint = add(at.from(carry), at.from(dh));
            const Gradients<V> g =
                G::backward(at.from(p0), at.from(p1), at.third(p2), at.from(h_prev), adjoint.hi);
            return {g, multiply(adjoint, g.a)};
        }
        template <class B> MINRNN_INLINE void put(B at, const Adjoint &result) const {
            at.to(carry, result.next);
            at.to(d0, result.gradients.d0);
            at.to(d1, result.gradients.d1);
            if constexpr (G::num_pre > 2) at.to(d2, result.gradients.d2);
        }
    };

    struct BackwardPrefix {
        In p0, p1, p2, dh;
        CarryRow carry, decay;
        template <class B> MINRNN_INLINE Prefix step(B at) const {
            const Decay<V> a = G::forward(at.from(p0), at.from(p1), at.third(p2)).a;
            return {multiply(add(at.from(carry), at.from(dh)), a), multiply(at.from(decay), a)};
        }
        template <class B> MINRNN_INLINE void put(B at, const Prefix &next) const {
            at.to(carry, next.state);
            at.to(decay, next.product);
        }
    };

    struct Round {
        const Real *from;
        IO *to;
        template <class B> MINRNN_INLINE V step(B at) const { return load(from + at.d, at.count); }
        template <class B> MINRNN_INLINE void put(B at, V x) const { store(x, to + at.d, at.count); }
    };

    // All n channels. The last block overlaps the one before it where n is no multiple of the lanes: it is computed
    // first, from what the arrays still hold, and stored last, over equal numbers.
    template <class Kernel> static MINRNN_INLINE void sweep(Order order, int64_t n, const Kernel &kernel) {
        constexpr int64_t lanes = kLanes<V>;
        if (n < lanes) {
            const Block<int64_t> only{0, n};
            kernel.put(only, kernel.step(only));
            return;
        }
        const int64_t rest = n % lanes;
        if (rest == 0) {
            blocks(order, n, kernel);
            return;
        }
        const Block<All> last{n - lanes, {}};
        const auto result = kernel.step(last);
        blocks(order, n - rest, kernel);
        kernel.put(last, result);
    }

    template <class Kernel> static MINRNN_INLINE void blocks(Order order, int64_t n, const Kernel &kernel) {
        constexpr int64_t lanes = kLanes<V>;
        const int64_t first = order == Order::kRising ? 0 : n - lanes, step = order == Order::kRising ? lanes : -lanes;
        for (int64_t i = 0; i < n / lanes; ++i) {
            const Block<All> at{first + i * step, {}};
            kernel.put(at, kernel.step(at));
        }
    }

    static void forward(Order order, int64_t n, const Pre &pre, CarryRow carry, IO *h) {
        sweep(order, n, Forward{pre[0], pre[1], pre[2], carry, h});
    }
    static void forward_prefix(Order order, int64_t n, const Pre &pre, CarryRow carry, CarryRow decay) {
        sweep(order, n, ForwardPrefix{pre[0], pre[1], pre[2], carry, decay});
    }
    static void backward(Order order, int64_t n, const Pre &pre, const IO *h_prev, const IO *dh, CarryRow carry,
                         const typename RowKernels<IO>::Gradients &dpre) {
        sweep(order, n, Backward{pre[0], pre[1], pre[2], h_prev, dh, carry, dpre[0], dpre[1], dpre[2]});
    }
    static void backward_prefix(Order order, int64_t n, const Pre &pre, const IO *dh, CarryRow carry, CarryRow decay) {
        sweep(order, n, BackwardPrefix{pre[0], pre[1], pre[2], dh, carry, decay});
    }
    static void round(int64_t n, const Real *from, IO *to) { sweep(Order::kRising, n, Round{from, to}); }

    static constexpr RowKernels<IO> kernels() { return {forward, forward_prefix, backward, backward_prefix, round}; }
};

template <class IO, template <template <class> class> class G, class Set> constexpr void fill(Set &set, Gate gate) {
    set[gate][kPositive] = Rows<IO, G<Positive>>::kernels();
    set[gate][kLinear] = Rows<IO, G<Linear>>::kernels();
    set[gate][kTanh] = Rows<IO, G<Tanh>>::kernels();
}

template <class IO, class Set> constexpr void fill_all(Set &set) {
    for (int c = 0; c < kNumCandidates; ++c) set[kIdentity][c] = Rows<IO, Identity>::kernels();
    fill<IO, MinGRU>(set, kMinGRU);
    fill<IO, MinLSTM>(set, kMinLSTM);
    fill<IO, MinLSTMUnnormalised>(set, kMinLSTMUnnormalised);
}

constexpr RowTable make_rows() {
    RowTable table{};
    fill_all<float>(table.single);
    fill_all<double>(table.full);
    fill_all<bfloat16>(table.brain);
    fill_all<float16>(table.half);
    return table;
}

}  // namespace

namespace MINRNN_ISA {
extern constexpr RowTable rows = make_rows();
}

}  // namespace minrnn
