// The Python module minrnn.ops._cpu: tensors in, nothing out.
//
// Shapes and dtypes are trusted: src/minrnn/ops/cpu.py passes what recurrence.py has checked. That a tensor has memory of
// that extent is checked here (tensor.h).
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "memory.h"
#include "scan.h"
#include "tensor.h"

namespace minrnn {

void bind_decode(nb::module_ &m, Isa isa, const RowTable &rows);  // decode_bind.cpp

namespace {

// Of the instruction set that was chosen when the module was loaded.
const RowTable *rows;

void serve(Isa isa) {
    switch (isa) {
#ifdef MINRNN_X86
        case Isa::avx512_bf16: rows = &avx512_bf16::rows; return;
        case Isa::avx512: rows = &avx512::rows; return;
        case Isa::avx2: rows = &avx2::rows; return;
#endif
        default: rows = &baseline::rows;
    }
}

using Tensors = std::vector<nb::handle>;
using Start = std::array<nb::handle, 2>;  // h0 and reset, either None

template <class IO> Sequence<IO> sequence(const char *what, nb::handle x, const Sizes<3> &shape) {
    const View<IO, 3> v = view<IO>(what, x, shape);
    return {v.data, v.strides[0], v.strides[1]};
}

template <class Real> States<Real> states(const char *what, nb::handle x, const Sizes<3> &shape) {
    const View<Real, 2> v = view<Real>(what, x, Sizes<2>{shape[0], shape[2]});
    return {v.data, v.strides[0]};
}

struct Call {
    int dtype, gate, candidate, num_pre, threads;
    bool reverse;
    Sizes<3> shape;  // B, T, D
    Tensors pre;     // each (B, T, D), or one that holds num_pre of them side by side
    nb::handle h0, reset;
};

template <class IO> using Parts = std::array<Sequence<IO>, 3>;

template <class IO> Parts<IO> parts(const char *what, const Tensors &x, const Call &call) {
    Parts<IO> found{};
    const auto [B, T, D] = call.shape;
    if (x.size() != 1) {
        for (std::size_t j = 0; j < x.size(); ++j) found.at(j) = sequence<IO>(what, x[j], call.shape);
        return found;
    }
    const Sequence<IO> whole = sequence<IO>(what, x[0], {B, T, call.num_pre * D});
    for (int j = 0; j < call.num_pre; ++j) found.at(j) = {whole.data + j * D, whole.stride_b, whole.stride_t};
    return found;
}

template <class IO> Problem<IO> problem(const Call &call) {
    using Real = typename Problem<IO>::Real;
    const Parts<const IO> pre = parts<const IO>("a pre-activation", call.pre, call);
    const View<const uint8_t, 2> reset =
        view<const uint8_t>("reset", call.reset, Sizes<2>{call.shape[0], call.shape[1]});
    return {call.shape[0], call.shape[1], call.shape[2], call.gate, call.candidate, call.num_pre, call.threads,
            call.reverse, {pre[0], pre[1], pre[2]}, states<const Real>("h0", call.h0, call.shape),
            {reset.data, reset.strides[0], reset.strides[1]}};
}

template <class IO> void forward(const Call &call, nb::handle h) {
    const Problem<IO> p = problem<IO>(call);
    const Forward<IO> pass(p, *rows, sequence<IO>("h", h, call.shape));
    nb::gil_scoped_release release;
    run(pass, p.B, p.T, p.D, p.threads);
}

template <class IO>
void backward(const Call &call, nb::handle dh, nb::handle h, const Tensors &dpre, nb::handle dh0) {
    using Real = typename Problem<IO>::Real;
    const Problem<IO> p = problem<IO>(call);
    const Parts<IO> outputs = parts<IO>("a gradient", dpre, call);
    const Backward<IO> pass(p, *rows, sequence<const IO>("dh", dh, call.shape),
                            sequence<const IO>("h", h, call.shape), {outputs[0], outputs[1], outputs[2]},
                            states<Real>("dh0", dh0, call.shape));
    nb::gil_scoped_release release;
    run(pass, p.B, p.T, p.D, p.threads);
}

// dtypes are numbered as in cpu.py: float32, float64, bfloat16, float16.
template <class F> void for_dtype(int dtype, F &&f) {
    switch (dtype) {
        case 0: return f(float());
        case 1: return f(double());
        case 2: return f(bfloat16());
        case 3: return f(float16());
        default: throw std::invalid_argument("minrnn._cpu: unknown dtype code " + std::to_string(dtype));
    }
}

}  // namespace
}  // namespace minrnn

NB_MODULE(_cpu, m) {
    using namespace minrnn;
    const Isa isa = choose_isa();
    serve(isa);
    m.attr("isa") = kIsaNames[static_cast<int>(isa)];
    nb::set_leak_warnings(false);  // a model that lives until the interpreter ends is no leak
    as_torch_does();
    m.def("prefer_huge_pages", &prefer_huge_pages);
    m.def("forward", [](int dtype, int gate, int candidate, int num_pre, int threads, bool reverse, Sizes<3> shape,
                        const Tensors &pre, const Start &start, nb::handle h) {
        const Call call{dtype, gate, candidate, num_pre, threads, reverse, shape, pre, start[0], start[1]};
        for_dtype(dtype, [&](auto io) { forward<decltype(io)>(call, h); });
    });
    m.def("backward", [](int dtype, int gate, int candidate, int num_pre, int threads, bool reverse, Sizes<3> shape,
                         const Tensors &pre, const Start &start, nb::handle dh, nb::handle h,
                         const Tensors &dpre, nb::handle dh0) {
        const Call call{dtype, gate, candidate, num_pre, threads, reverse, shape, pre, start[0], start[1]};
        for_dtype(dtype, [&](auto io) { backward<decltype(io)>(call, dh, h, dpre, dh0); });
    });
    bind_decode(m, isa, *rows);
}
