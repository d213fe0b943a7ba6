// A model's step in the Python module minrnn.ops._cpu: reads its inputs and writes its outputs in place.
//
// Shapes and dtypes are trusted: src/minrnn/ops/chain.py checks them. That a tensor has memory of that extent is checked
// here (tensor.h).
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "chain.h"
#include "tensor.h"

namespace minrnn {
namespace {

// Of the instruction set that was chosen when the module was loaded.
const RowTable *rows;
const ChainKernels *chain_kernels;

using Tensors = std::vector<nb::handle>;
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

}  // namespace

void bind_decode(nb::module_ m, Isa isa) {
    rows = &rows_of(isa), chain_kernels = &chain_of(isa);
    m.def("layouts", &layouts);
    nb::class_<Chain>(m, "Chain")
        .def("__init__", [](Chain *chain, int64_t d_model) { new (chain) Chain{d_model, {}, {}, {}, {}, {}}; })
        .def("start", [](Chain &chain, const std::vector<std::pair<int64_t, Pair>> &parts,
                         const NormOf &of) {
            for (const auto &[in, part] : parts) chain.start.push_back(projection(in, chain.d_model, part));
            chain.start_norm = norm(of, chain.d_model);
        })
        // wide: what W_in gives; D: what W_out takes
        .def("branch", [](Chain &chain, const NormOf &of, int64_t conv_width, Pair conv, int64_t wide, int64_t D,
                          Pair up, Pair down, int gate, int candidate, bool is_signed, int num_pre,
                          int activation, bool residual) {
            chain.branches.push_back({norm(of, chain.d_model),
                                      {conv_width, affine(conv, conv_width * chain.d_model, chain.d_model)},
                                      projection(chain.d_model, wide, up), projection(D, chain.d_model, down),
                                      {gate, candidate, is_signed}, num_pre, static_cast<Activation>(activation), residual});
        })
        .def("end", [](Chain &chain, const NormOf &of, int64_t out, Pair part) {
            chain.end_norm = norm(of, chain.d_model);
            chain.end = projection(chain.d_model, out, part);
        })
        .def("step", &step);
}

}  // namespace minrnn
