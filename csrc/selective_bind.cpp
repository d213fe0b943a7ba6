// The Python module minrnn.ops._selective: raw pointers in, nothing out.
//
// Nothing is checked: src/minrnn/ops/selective/cpu.py is the only caller.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>

#include <array>

#include "selective.h"

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

using Address = int64_t;
using Strided = std::array<int64_t, 3>;  // address, batch stride, time stride (in elements)

template <class T> T *pointer(Address address) { return reinterpret_cast<T *>(address); }
template <class T> Rows<T> rows(const Strided &s) { return {pointer<T>(s[0]), s[1], s[2]}; }

struct Call {
    std::array<int64_t, 5> shape;    // B, T, D, N, chunk
    std::array<Strided, 6> inputs;   // u, delta_pre, z, B, C, reset
    std::array<Address, 3> states;   // A, D, h0
};

template <class Real> Inputs<Real> inputs(const Call &c) {
    const auto &[B, T, D, N, chunk] = c.shape;
    return {B, T, D, N, chunk,
            rows<const Real>(c.inputs[0]), rows<const Real>(c.inputs[1]), rows<const Real>(c.inputs[2]),
            rows<const Real>(c.inputs[3]), rows<const Real>(c.inputs[4]),
            pointer<const Real>(c.states[0]), pointer<const Real>(c.states[1]), pointer<const Real>(c.states[2]),
            rows<const uint8_t>(c.inputs[5])};
}

template <class Real> void run_forward(const Call &c, int threads, const Strided &y, Address last, Address borders) {
    forward(ForwardCall<Real>{inputs<Real>(c), rows<Real>(y), pointer<Real>(last), pointer<Real>(borders)},
            kernels<Real>(), threads);
}

template <class Real>
void run_backward(const Call &c, int threads, const Strided &dy, const std::array<Address, 2> &saved,
                  const std::array<Strided, 3> &dsequences, const std::array<Address, 5> &dsums) {
    const BackwardCall<Real> call{
        inputs<Real>(c), rows<const Real>(dy), pointer<const Real>(saved[0]), pointer<const Real>(saved[1]),
        rows<Real>(dsequences[0]), rows<Real>(dsequences[1]), rows<Real>(dsequences[2]),
        pointer<Real>(dsums[0]), pointer<Real>(dsums[1]), pointer<double>(dsums[2]), pointer<double>(dsums[3]),
        pointer<Real>(dsums[4])};
    backward(call, kernels<Real>(), threads);
}

}  // namespace
}  // namespace minrnn::selective

NB_MODULE(_selective, m) {
    using namespace minrnn::selective;
    const minrnn::Isa isa = minrnn::choose_isa();
    minrnn::selective::table = &minrnn::selective::table_of(isa);
    m.attr("isa") = minrnn::kIsaNames[static_cast<int>(isa)];
    m.def("num_groups", &num_groups);
    m.def("forward", [](bool full, int threads, std::array<int64_t, 5> shape, std::array<Strided, 6> inputs,
                        std::array<Address, 3> states, Strided y, Address last, Address borders) {
        nb::gil_scoped_release release;
        const Call call{shape, inputs, states};
        full ? run_forward<double>(call, threads, y, last, borders) : run_forward<float>(call, threads, y, last, borders);
    });
    // saved: dlast, borders. dsequences: du, ddelta_pre, dz. dsums: dB, dC, dA, dD, dh0 (see BackwardCall).
    m.def("backward", [](bool full, int threads, std::array<int64_t, 5> shape, std::array<Strided, 6> inputs,
                         std::array<Address, 3> states, Strided dy, std::array<Address, 2> saved,
                         std::array<Strided, 3> dsequences, std::array<Address, 5> dsums) {
        nb::gil_scoped_release release;
        const Call call{shape, inputs, states};
        full ? run_backward<double>(call, threads, dy, saved, dsequences, dsums)
             : run_backward<float>(call, threads, dy, saved, dsequences, dsums);
    });
}
