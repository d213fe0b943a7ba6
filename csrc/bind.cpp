// The Python module minrnn.ops._cpu: tensors in, nothing out.
//
// Shapes and dtypes are trusted: src/minrnn/ops/cpu.py passes what recurrence.py has checked, and ops/chain.py what it has
// itself. That a tensor has memory of that extent is made sure of here (tensor.h).
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "chain.h"
#include "memory.h"
#include "scan.h"
#include "tensor.h"

namespace minrnn {
namespace {

// Of the instruction set that was chosen when the module was loaded.
const RowTable *rows;
const ChainKernels *chain_kernels;

void serve(Isa isa) {
    switch (isa) {
#ifdef MINRNN_X86
        case Isa::avx512_bf16: rows = &avx512_bf16::rows, chain_kernels = &avx512_bf16::chain; return;
        case Isa::avx512: rows = &avx512::rows, chain_kernels = &avx512::chain; return;
        case Isa::avx2: rows = &avx2::rows, chain_kernels = &avx2::chain; return;
#endif
        default: rows = &baseline::rows, chain_kernels = &baseline::chain;
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

using Pair = std::pair<nb::handle, nb::handle>;  // weight and bias, either None

const float *read(const char *what, nb::handle x, int64_t count) { return reach<const float>(what, x, count); }

Affine affine(const Pair &of, int64_t weights, int64_t biases) {
    return {read("a weight", of.first, weights), read("a bias", of.second, biases)};
}

Projection projection(int64_t in, int64_t out, const Pair &of) {
    const Affine found = affine(of, in * out, out);
    return {in, out, found.weight, found.bias};
}

using NormOf = std::tuple<int, float, Pair>;

Norm norm(const NormOf &of, int64_t n) {
    return {static_cast<NormKind>(std::get<0>(of)), std::get<1>(of), affine(std::get<2>(of), n, n)};
}

// Of a branch: its window before and after the step, and its h before and after it.
using Carried = std::tuple<nb::handle, nb::handle, nb::handle, nb::handle>;

BranchStates carried(const Branch &b, int64_t num_rows, const Carried &of) {
    const auto &[window, next_window, h, next_h] = of;
    const int64_t past = num_rows * std::max<int64_t>(b.conv.width - 1, 0) * b.up.in, states = num_rows * b.down.in;
    return {read("a window", window, past), made<float>(next_window), read("h", h, states),
            made<float>(next_h)};
}

bool step(const Chain &chain, int64_t num_rows, int threads, const Tensors &inputs, const std::vector<Carried> &states,
          nb::handle y) {
    std::vector<const float *> in;
    std::vector<BranchStates> of;
    for (std::size_t k = 0; k < inputs.size(); ++k)
        in.push_back(read("an input", inputs[k],
                          num_rows * (chain.start.empty() ? chain.d_model : chain.start.at(k).in)));
    for (std::size_t i = 0; i < states.size(); ++i) of.push_back(carried(chain.branches.at(i), num_rows, states[i]));
    float *out = made<float>(y);
    nb::gil_scoped_release release;
    return run(chain, *rows, *chain_kernels, num_rows, threads, in, of, out);
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
    m.def("layouts", &layouts);
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
    nb::class_<Chain>(m, "Chain")
        .def("__init__", [](Chain *chain, int64_t d_model) { new (chain) Chain{d_model, {}, {}, {}, {}, {}}; })
        .def("start", [](Chain &chain, const std::vector<std::pair<int64_t, Pair>> &parts,
                         const NormOf &of) {
            for (const auto &[in, part] : parts) chain.start.push_back(projection(in, chain.d_model, part));
            chain.start_norm = norm(of, chain.d_model);
        })
        // wide: what W_in gives; D: what W_out takes
        .def("branch", [](Chain &chain, const NormOf &of, int64_t conv_width, Pair conv, int64_t wide, int64_t D,
                          Pair up, Pair down, int gate, int candidate, int num_pre, int activation, bool residual) {
            chain.branches.push_back({norm(of, chain.d_model),
                                      {conv_width, affine(conv, conv_width * chain.d_model, chain.d_model)},
                                      projection(chain.d_model, wide, up), projection(D, chain.d_model, down), gate,
                                      candidate, num_pre, static_cast<Activation>(activation), residual});
        })
        .def("end", [](Chain &chain, const NormOf &of, int64_t out, Pair part) {
            chain.end_norm = norm(of, chain.d_model);
            chain.end = projection(chain.d_model, out, part);
        })
        .def("step", &step);
}
