// The innermost loops, compiled with -DMINRNN_ISA=<name> and that instruction set's flags.
#include "rows.h"

#include "gates.h"

namespace minrnn {
namespace {

// One block of lanes of a row, beginning at channel d; Count is All, or a number of channels below that.
template <class Count> struct Block {
    int64_t d;
    Count count;
    template <class X> MINRNN_INLINE auto from(const X *row) const { return load(row + d, count); }
    template <class V, class X> MINRNN_INLINE void to(X *row, V x) const { store(x, row + d, count); }
    template <class Real> MINRNN_INLINE auto from(CarryRow<Real> row) const {
        return Carry<Lanes<Real>>{from(row.hi), from(row.lo)};
    }
    template <class Real> MINRNN_INLINE void to(CarryRow<Real> row, Carry<Lanes<Real>> carry) const {
        to(row.hi, carry.hi);
        to(row.lo, carry.lo);
    }
};

// A step's row. Each kernel below computes one block with `step`, stores the result with `put`, and moves its rows to the
// next step with `next`.
template <class X> struct Cursor {
    X *row;
    int64_t stride;
    MINRNN_INLINE explicit Cursor(Rows<X> rows) : row(rows.first), stride(rows.stride) {}
    MINRNN_INLINE void next() { row += stride; }
};

template <class IO, class G> struct Kernels {
    using Real = typename Computed<IO>::Real;
    using V = Lanes<Real>;
    using CarryRow = minrnn::CarryRow<Real>;
    using Pre = typename RowKernels<IO>::Pre;
    using Gradients = typename RowKernels<IO>::Gradients;

    struct Inputs {
        Cursor<const IO> p0, p1, p2;
        MINRNN_INLINE explicit Inputs(const Pre &pre) : p0(pre[0]), p1(pre[1]), p2(pre[2]) {}
        template <class B> MINRNN_INLINE V third(B at) const {
            if constexpr (G::num_pre > 2) return at.from(p2.row);
            return V{};
        }
        template <class B> MINRNN_INLINE auto recurrence(B at) const {
            return G::forward(at.from(p0.row), at.from(p1.row), third(at));
        }
        MINRNN_INLINE void next() {
            p0.next();
            p1.next();
            p2.next();
        }
    };

    struct Forward {
        Inputs in;
        CarryRow carry;
        Cursor<IO> h;
        template <class B> MINRNN_INLINE Carry<V> step(B at) const {
            return advance(at.from(carry), in.recurrence(at));
        }
        template <class B> MINRNN_INLINE void put(B at, const Carry<V> &state) const {
            at.to(carry, state);
            at.to(h.row, state.hi);
        }
        MINRNN_INLINE void next() {
            in.next();
            h.next();
        }
    };

    struct Prefix {
        Carry<V> state, product;
    };

    struct ForwardPrefix {
        Inputs in;
        CarryRow carry, decay;
        template <class B> MINRNN_INLINE Prefix step(B at) const {
            const auto r = in.recurrence(at);
            return {advance(at.from(carry), r), multiply(at.from(decay), r.a)};
        }
        template <class B> MINRNN_INLINE void put(B at, const Prefix &prefix) const {
            at.to(carry, prefix.state);
            at.to(decay, prefix.product);
        }
        MINRNN_INLINE void next() { in.next(); }
    };

    struct Adjoint {
        decltype(G::backward(V{}, V{}, V{}, V{}, V{})) gradients;
        Carry<V> carry;
    };

    struct Backward {
        Inputs in;
        Cursor<const IO> h_prev, dh;
        CarryRow carry;
        Cursor<IO> d0, d1, d2;
        template <class B> MINRNN_INLINE Adjoint step(B at) const {
            const Carry<V> adjoint = add(at.from(carry), at.from(dh.row));
            const auto g = G::backward(at.from(in.p0.row), at.from(in.p1.row), in.third(at), at.from(h_prev.row),
                                       adjoint.hi);
            return {g, multiply(adjoint, g.a)};
        }
        template <class B> MINRNN_INLINE void put(B at, const Adjoint &adjoint) const {
            at.to(carry, adjoint.carry);
            at.to(d0.row, adjoint.gradients.d0);
            at.to(d1.row, adjoint.gradients.d1);
            if constexpr (G::num_pre > 2) at.to(d2.row, adjoint.gradients.d2);
        }
        MINRNN_INLINE void next() {
            in.next();
            h_prev.next();
            dh.next();
            d0.next();
            d1.next();
            d2.next();
        }
    };

    struct BackwardPrefix {
        Inputs in;
        Cursor<const IO> dh;
        CarryRow carry, decay;
        template <class B> MINRNN_INLINE Prefix step(B at) const {
            const auto a = in.recurrence(at).a;
            return {multiply(add(at.from(carry), at.from(dh.row)), a), multiply(at.from(decay), a)};
        }
        template <class B> MINRNN_INLINE void put(B at, const Prefix &prefix) const {
            at.to(carry, prefix.state);
            at.to(decay, prefix.product);
        }
        MINRNN_INLINE void next() {
            in.next();
            dh.next();
        }
    };

    struct Round {
        const Real *from;
        IO *to;
        template <class B> MINRNN_INLINE V step(B at) const { return at.from(from); }
        template <class B> MINRNN_INLINE void put(B at, V x) const { at.to(to, x); }
        MINRNN_INLINE void next() {}
    };

    template <class Kernel> static MINRNN_INLINE void sweep(int64_t n, int64_t steps, bool falling, Kernel kernel) {
        for (int64_t k = 0; k < steps; ++k, kernel.next()) row(n, falling, kernel);
    }

    // All n channels. The last block overlaps the one before it where n is no multiple of the lanes: it is computed
    // first, from what the arrays still hold, and stored last, over equal numbers.
    template <class Kernel> static MINRNN_INLINE void row(int64_t n, bool falling, const Kernel &kernel) {
        constexpr int64_t lanes = kLanes<V>;
        if (n < lanes) {
            const Block<int64_t> only{0, n};
            kernel.put(only, kernel.step(only));
            return;
        }
        const int64_t rest = n % lanes;
        if (rest == 0) {
            blocks(n, falling, kernel);
            return;
        }
        const Block<All> last{n - lanes, {}};
        const auto result = kernel.step(last);
        blocks(n - rest, falling, kernel);
        kernel.put(last, result);
    }

    template <class Kernel> static MINRNN_INLINE void blocks(int64_t n, bool falling, const Kernel &kernel) {
        constexpr int64_t lanes = kLanes<V>;
        const int64_t first = falling ? n - lanes : 0, next = falling ? -lanes : lanes;
        for (int64_t i = 0; i < n / lanes; ++i) {
            const Block<All> at{first + i * next, {}};
            kernel.put(at, kernel.step(at));
        }
    }

    static void forward(int64_t n, int64_t steps, const Pre &pre, CarryRow carry, Rows<IO> h) {
        sweep(n, steps, h.stride < 0, Forward{Inputs(pre), carry, Cursor<IO>(h)});
    }
    static void forward_prefix(int64_t n, int64_t steps, const Pre &pre, CarryRow carry, CarryRow decay) {
        sweep(n, steps, pre[0].stride < 0, ForwardPrefix{Inputs(pre), carry, decay});
    }
    static void backward(int64_t n, int64_t steps, const Pre &pre, Rows<const IO> h_prev, Rows<const IO> dh,
                         CarryRow carry, const Gradients &dpre) {
        sweep(n, steps, dpre[0].stride < 0,
              Backward{Inputs(pre), Cursor<const IO>(h_prev), Cursor<const IO>(dh), carry, Cursor<IO>(dpre[0]),
                       Cursor<IO>(dpre[1]), Cursor<IO>(dpre[2])});
    }
    static void backward_prefix(int64_t n, int64_t steps, const Pre &pre, Rows<const IO> dh, CarryRow carry,
                                CarryRow decay) {
        sweep(n, steps, pre[0].stride < 0, BackwardPrefix{Inputs(pre), Cursor<const IO>(dh), carry, decay});
    }
    static void round(int64_t n, const Real *from, IO *to) { sweep(n, 1, false, Round{from, to}); }

    static bool finite(int64_t n, const Real *row) {
        V found{};  // zero, or NaN once something is not finite
        int64_t d = 0;
        for (; d + kLanes<V> <= n; d += kLanes<V>) {
            const V x = load(row + d);
            found += x - x;
        }
        if (d < n) {
            const V x = load(row + d, n - d);
            found += x - x;
        }
        for (int l = 0; l < kLanes<V>; ++l)
            if (found[l] != 0) return false;
        return true;
    }

    static constexpr RowKernels<IO> table() {
        return {forward, forward_prefix, backward, backward_prefix, round, finite, G::num_pre};
    }
};

template <class IO, template <template <class> class, bool> class G, bool has_signed>
constexpr void fill(KernelSet<IO> &set, int gate) {
#define MINRNN_FILL(candidate, ...)                                                  \
    set.kernels[gate][k##candidate][0] = Kernels<IO, G<candidate, false>>::table();  \
    if constexpr (has_signed) set.kernels[gate][k##candidate][1] = Kernels<IO, G<candidate, true>>::table();
    MINRNN_CANDIDATES(MINRNN_FILL)
#undef MINRNN_FILL
}

template <class IO> constexpr void fill_all(KernelSet<IO> &set) {
    int gate = 0;
#define MINRNN_FILL(functor, name, has_signed) fill<IO, functor, has_signed>(set, gate++);
    MINRNN_GATES(MINRNN_FILL)
#undef MINRNN_FILL
}

constexpr RowTable make_rows() {
    RowTable table{};
#define MINRNN_NAME(functor, name, has_signed) table.gate_names[table.num_gates++] = name;
    MINRNN_GATES(MINRNN_NAME)
#undef MINRNN_NAME
#define MINRNN_FILL(IO, ...) fill_all<IO>(table);
    MINRNN_DTYPES(MINRNN_FILL)
#undef MINRNN_FILL
    return table;
}

}  // namespace

namespace MINRNN_ISA {
extern constexpr RowTable rows = make_rows();
}

}  // namespace minrnn
