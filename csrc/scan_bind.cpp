// The gated scan in the Python module minrnn.ops._cpu: reads its inputs and writes its outputs in place.
//
// Shapes and dtypes are trusted: src/minrnn/ops/cpu.py passes what recurrence.py has checked. That a tensor has memory
// of that extent is checked here (tensor.h).
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "scan.h"
#include "tensor.h"

namespace minrnn {
namespace {

const RowTable *table;  // of the instruction set that was chosen when the module was loaded

using Tensors = std::vector<nb::handle>;
using Start = std::array<nb::handle, 2>;  // h0 and reset, either None

template <class Real> States<Real> states(const char *what, nb::handle x, const Sizes<3> &shape) {
    const View<Real, 2> v = view<Real>(what, x, Sizes<2>{shape[0], shape[2]});
    return {v.data, v.strides[0]};
}

struct Call {
    Mode mode;
    bool reverse;
    int threads;
    Sizes<3> shape;  // B, T, D
    Tensors pre;     // each (B, T, D), or one that holds all of them side by side
    Start start;
};

template <class IO> using Parts = std::array<Sequence<IO>, 3>;

template <class IO> Parts<IO> parts(const char *what, const Tensors &x, int num_pre, const Sizes<3> &shape) {
    Parts<IO> found{};
    const auto [B, T, D] = shape;
    if (x.size() != 1) {
        for (std::size_t j = 0; j < x.size(); ++j) found.at(j) = sequence<IO>(what, x[j], shape);
        return found;
    }
    const Sequence<IO> whole = sequence<IO>(what, x[0], {B, T, num_pre * D});
    for (int j = 0; j < num_pre; ++j) found.at(j) = {whole.data + j * D, whole.stride_b, whole.stride_t};
    return found;
}

template <class IO> Problem<IO> problem(const Call &call) {
    using Real = typename Problem<IO>::Real;
    const auto [B, T, D] = call.shape;
    const auto &[h0, reset] = call.start;
    const RowKernels<IO> &kernels = table->of<IO>(call.mode);
    const Parts<const IO> pre = parts<const IO>("a pre-activation", call.pre, kernels.num_pre, call.shape);
    return {B, T, D, call.threads, call.reverse, kernels, {pre[0], pre[1], pre[2]},
            states<const Real>("h0", h0, call.shape), resets(reset, B, T)};
}

template <class IO> void forward(const Call &call, nb::handle h) {
    const Problem<IO> p = problem<IO>(call);
    const Forward<IO> pass(p, sequence<IO>("h", h, call.shape));
    nb::gil_scoped_release release;
    run(pass, p.B, p.T, p.D, p.threads);
}

template <class IO>
void backward(const Call &call, nb::handle dh, nb::handle h, const Tensors &dpre, nb::handle dh0) {
    using Real = typename Problem<IO>::Real;
    const Problem<IO> p = problem<IO>(call);
    const Parts<IO> outputs = parts<IO>("a gradient", dpre, p.kernels.num_pre, call.shape);
    const Backward<IO> pass(p, sequence<const IO>("dh", dh, call.shape), sequence<const IO>("h", h, call.shape),
                            {outputs[0], outputs[1], outputs[2]}, states<Real>("dh0", dh0, call.shape));
    nb::gil_scoped_release release;
    run(pass, p.B, p.T, p.D, p.threads);
}

template <class IO> void prefix(const Call &call, nb::handle end, nb::handle decay) {
    using Real = typename Problem<IO>::Real;
    const Problem<IO> p = problem<IO>(call);
    const Forward<IO> pass(p, {});
    const States<Real> ends = states<Real>("end", end, call.shape), decays = states<Real>("decay", decay, call.shape);
    nb::gil_scoped_release release;
    run_prefix(pass, p.B, p.T, p.D, p.threads, ends, decays);
}

// The end is the gradient of the state before the first step.
template <class IO> void backward_prefix(const Call &call, nb::handle dh, nb::handle end, nb::handle decay) {
    using Real = typename Problem<IO>::Real;
    const Problem<IO> p = problem<IO>(call);
    const Sequence<IO> none[3] = {};
    const Backward<IO> pass(p, sequence<const IO>("dh", dh, call.shape), {}, none, {});
    const States<Real> ends = states<Real>("end", end, call.shape), decays = states<Real>("decay", decay, call.shape);
    nb::gil_scoped_release release;
    run_prefix(pass, p.B, p.T, p.D, p.threads, ends, decays);
}

template <class F> void for_dtype(int dtype, F &&f) {
    switch (dtype) {
#define MINRNN_CASE(IO, ...) \
    case k##IO: return f(IO());
        MINRNN_DTYPES(MINRNN_CASE)
#undef MINRNN_CASE
        default: throw std::invalid_argument("minrnn: no dtype " + std::to_string(dtype));
    }
}

template <std::size_t n> nb::tuple names(const char *const (&of)[n]) {
    nb::list found;
    for (const char *name : of) found.append(name);
    return nb::tuple(found);
}

// {name: (number of pre-activations, whether there is a signed form)}
nb::dict gates() {
    nb::dict found;
    for (int gate = 0; gate < table->num_gates; ++gate) {
        const auto &kernels = table->KernelSet<float>::kernels[gate][0];
        found[table->gate_names[gate]] = nb::make_tuple(kernels[0].num_pre, kernels[1].forward != nullptr);
    }
    return found;
}

}  // namespace

void bind_scan(nb::module_ m, Isa isa) {
    table = &rows_of(isa);
    m.attr("gates") = gates();
    m.attr("candidates") = names(kCandidateNames);
    m.attr("dtypes") = names(kDtypeNames);
    m.def("forward", [](int dtype, int gate, int candidate, bool is_signed, bool reverse, int threads, Sizes<3> shape,
                        const Tensors &pre, const Start &start, nb::handle h) {
        const Call call{{gate, candidate, is_signed}, reverse, threads, shape, pre, start};
        for_dtype(dtype, [&](auto io) { forward<decltype(io)>(call, h); });
    });
    m.def("backward", [](int dtype, int gate, int candidate, bool is_signed, bool reverse, int threads, Sizes<3> shape,
                         const Tensors &pre, const Start &start, nb::handle dh, nb::handle h, const Tensors &dpre,
                         nb::handle dh0) {
        const Call call{{gate, candidate, is_signed}, reverse, threads, shape, pre, start};
        for_dtype(dtype, [&](auto io) { backward<decltype(io)>(call, dh, h, dpre, dh0); });
    });
    m.def("prefix", [](int dtype, int gate, int candidate, bool is_signed, bool reverse, int threads, Sizes<3> shape,
                       const Tensors &pre, const Start &start, nb::handle end, nb::handle decay) {
        const Call call{{gate, candidate, is_signed}, reverse, threads, shape, pre, start};
        for_dtype(dtype, [&](auto io) { prefix<decltype(io)>(call, end, decay); });
    });
    m.def("backward_prefix", [](int dtype, int gate, int candidate, bool is_signed, bool reverse, int threads,
                                Sizes<3> shape, const Tensors &pre, const Start &start, nb::handle dh, nb::handle end,
                                nb::handle decay) {
        const Call call{{gate, candidate, is_signed}, reverse, threads, shape, pre, start};
        for_dtype(dtype, [&](auto io) { backward_prefix<decltype(io)>(call, dh, end, decay); });
    });
}

}  // namespace minrnn
