// The selective scan in the Python module minrnn.ops._cpu: reads its inputs and writes its outputs in place.
//
// Shapes and dtypes are trusted: src/minrnn/ops/selective/cpu.py is the only caller. That a tensor has memory of that
// extent is checked here (tensor.h).
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>

#include <array>

#include "selective.h"
#include "tensor.h"

namespace minrnn {
namespace selective {
namespace {

const Table *table;  // of the instruction set that was chosen when the module was loaded

template <class Real> const Kernels<Real> &kernels();
template <> const Kernels<float> &kernels<float>() { return table->single; }
template <> const Kernels<double> &kernels<double>() { return table->full; }

template <std::size_t n> using Tensors = std::array<nb::handle, n>;

struct Call {
    Sizes<5> shape;        // batch, T, channels, N, chunk
    Tensors<6> sequences;  // u, delta_pre, z, B, C, reset
    Tensors<4> constants;  // A, D, delta_bias, h0
    int64_t batch() const { return shape[0]; }
    int64_t channels() const { return shape[2]; }
    int64_t states() const { return shape[0] * shape[2] * shape[3]; }
    int64_t borders() const { return ceil_div(shape[1], shape[4]) * states(); }
};

template <class X> Sequence<X> rows(const char *what, nb::handle x, const Call &call, int64_t width) {
    return sequence<X>(what, x, {call.shape[0], call.shape[1], width});
}

template <class Real> Inputs<Real> inputs(const Call &c) {
    const auto &[batch, T, channels, N, chunk] = c.shape;
    const auto &[u, delta_pre, z, B, C, reset] = c.sequences;
    const auto &[A, skip, bias, h0] = c.constants;
    return {batch, T, channels, N, chunk,
            rows<const Real>("u", u, c, channels), rows<const Real>("delta_pre", delta_pre, c, channels),
            rows<const Real>("z", z, c, channels), rows<const Real>("B", B, c, N), rows<const Real>("C", C, c, N),
            reach<const Real>("A", A, channels * N), reach<const Real>("D", skip, channels),
            reach<const Real>("delta_bias", bias, channels), reach<const Real>("h0", h0, c.states()),
            resets(reset, batch, T)};
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
    const auto &[batch, T, channels, N, chunk] = c.shape;
    const int64_t parts = num_groups(batch, channels) * batch * T * N;
    const BackwardCall<Real> call{
        inputs<Real>(c), rows<const Real>("dy", saved[0], c, channels), reach<const Real>("dh", saved[1], c.states()),
        reach<const Real>("borders", saved[2], c.borders()), rows<Real>("du", dsequences[0], c, channels),
        rows<Real>("ddelta_pre", dsequences[1], c, channels), rows<Real>("dz", dsequences[2], c, channels),
        reach<Real>("dB", dsums[0], parts), reach<Real>("dC", dsums[1], parts),
        reach<double>("dA", dsums[2], batch * channels * N), reach<double>("dD", dsums[3], batch * channels),
        reach<Real>("dh0", dsums[4], c.states())};
    nb::gil_scoped_release release;
    backward(call, kernels<Real>(), threads);
}

}  // namespace
}  // namespace selective

void bind_selective(nb::module_ m, Isa isa) {
    using namespace selective;
    table = &table_of(isa);
    m.def("num_groups", &num_groups);
    m.def("forward", [](bool full, int threads, Sizes<5> shape, Tensors<6> sequences, Tensors<4> constants,
                        Tensors<3> outputs) {
        const Call call{shape, sequences, constants};
        (full ? run_forward<double> : run_forward<float>)(call, threads, outputs);
    });
    m.def("backward", [](bool full, int threads, Sizes<5> shape, Tensors<6> sequences, Tensors<4> constants,
                         Tensors<3> saved, Tensors<3> dsequences, Tensors<5> dsums) {
        const Call call{shape, sequences, constants};
        (full ? run_backward<double> : run_backward<float>)(call, threads, saved, dsequences, dsums);
    });
}

}  // namespace minrnn
