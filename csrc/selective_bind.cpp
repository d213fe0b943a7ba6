// The Python module minrnn.ops._selective: tensors in, nothing out.
//
// Shapes and dtypes are trusted: src/minrnn/ops/selective/cpu.py is the only caller. That a tensor has memory of that
// extent is made sure of here (tensor.h).
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>

#include <array>

#include "selective.h"
#include "tensor.h"

namespace nb = nanobind;

namespace minrnn::selective {
namespace {

const Table *table;  // of the instruction set that was chosen when the module was loaded

const Table &table_of(Isa isa) {
    switch (isa) {
#ifdef MINRNN_X86
        case Isa::avx512_bf16: return avx512_bf16::table;
        case Isa::avx512: return avx512::table;
        case Isa::avx2: return avx2::table;
#endif
        default: return baseline::table;
    }
}

template <class Real> const Kernels<Real> &kernels();
template <> const Kernels<float> &kernels<float>() { return table->single; }
template <> const Kernels<double> &kernels<double>() { return table->full; }

template <std::size_t n> using Tensors = std::array<nb::handle, n>;

struct Call {
    Sizes<5> shape;        // B, T, D, N, chunk
    Tensors<6> sequences;  // u, delta_pre, z, B, C, reset
    Tensors<4> constants;  // A, D, delta_bias, h0
    int64_t batch() const { return shape[0]; }
    int64_t channels() const { return shape[2]; }
    int64_t states() const { return shape[0] * shape[2] * shape[3]; }
    int64_t borders() const { return (shape[1] + shape[4] - 1) / shape[4] * states(); }
};

template <class T> Rows<T> rows(const char *what, nb::handle x, const Call &call, int64_t width) {
    const View<T, 3> v = view<T>(what, x, Sizes<3>{call.shape[0], call.shape[1], width});
    return {v.data, v.strides[0], v.strides[1]};
}

template <class Real> Inputs<Real> inputs(const Call &c) {
    const auto &[B, T, D, N, chunk] = c.shape;
    const auto &[u, delta_pre, z, into, from, reset] = c.sequences;
    const auto &[A, skip, bias, h0] = c.constants;
    const View<const uint8_t, 2> resets = view<const uint8_t>("reset", reset, Sizes<2>{B, T});
    return {B, T, D, N, chunk,
            rows<const Real>("u", u, c, D), rows<const Real>("delta_pre", delta_pre, c, D),
            rows<const Real>("z", z, c, D), rows<const Real>("B", into, c, N), rows<const Real>("C", from, c, N),
            reach<const Real>("A", A, D * N), reach<const Real>("D", skip, D),
            reach<const Real>("delta_bias", bias, D), reach<const Real>("h0", h0, c.states()),
            {resets.data, resets.strides[0], resets.strides[1]}};
}

// outputs: y, the final state, borders or None.
template <class Real> void run_forward(const Call &c, int threads, const Tensors<3> &outputs) {
    const auto &[y, last, borders] = outputs;
    const ForwardCall<Real> call{inputs<Real>(c), rows<Real>("y", y, c, c.channels()),
                                 reach<Real>("h", last, c.states()), reach<Real>("borders", borders, c.borders())};
    nb::gil_scoped_release release;
    forward(call, kernels<Real>(), threads);
}

// saved: dy, dlast, borders. dsequences: du, ddelta_pre, dz. dsums: dB, dC, dA, dD, dh0 (see BackwardCall).
template <class Real>
void run_backward(const Call &c, int threads, const Tensors<3> &saved, const Tensors<3> &dsequences,
                  const Tensors<5> &dsums) {
    const auto &[B, T, D, N, chunk] = c.shape;
    const int64_t parts = num_groups(B, D) * B * T * N;
    const BackwardCall<Real> call{
        inputs<Real>(c), rows<const Real>("dy", saved[0], c, D), reach<const Real>("dh", saved[1], c.states()),
        reach<const Real>("borders", saved[2], c.borders()), rows<Real>("du", dsequences[0], c, D),
        rows<Real>("ddelta_pre", dsequences[1], c, D), rows<Real>("dz", dsequences[2], c, D),
        reach<Real>("dB", dsums[0], parts), reach<Real>("dC", dsums[1], parts), reach<double>("dA", dsums[2], B * D * N),
        reach<double>("dD", dsums[3], B * D), reach<Real>("dh0", dsums[4], c.states())};
    nb::gil_scoped_release release;
    backward(call, kernels<Real>(), threads);
}

}  // namespace
}  // namespace minrnn::selective

NB_MODULE(_selective, m) {
    using namespace minrnn::selective;
    const minrnn::Isa isa = minrnn::choose_isa();
    minrnn::selective::table = &minrnn::selective::table_of(isa);
    m.attr("isa") = minrnn::kIsaNames[static_cast<int>(isa)];
    minrnn::as_torch_does();
    m.def("num_groups", &num_groups);
    m.def("forward", [](bool full, int threads, minrnn::Sizes<5> shape, Tensors<6> sequences, Tensors<4> constants,
                        Tensors<3> outputs) {
        const Call call{shape, sequences, constants};
        (full ? run_forward<double> : run_forward<float>)(call, threads, outputs);
    });
    m.def("backward", [](bool full, int threads, minrnn::Sizes<5> shape, Tensors<6> sequences, Tensors<4> constants,
                         Tensors<3> saved, Tensors<3> dsequences, Tensors<5> dsums) {
        const Call call{shape, sequences, constants};
        (full ? run_backward<double> : run_backward<float>)(call, threads, saved, dsequences, dsums);
    });
}
