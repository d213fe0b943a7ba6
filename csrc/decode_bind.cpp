// A model's step in the Python module minrnn.ops._cpu.
//
// Shapes and dtypes are trusted: src/minrnn/models/fused_step.py checks them. That a tensor has memory of that extent,
// and that tokens and rows lie within their tables, is checked here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "decode.h"
#include "tensor.h"

namespace minrnn {
namespace {

// Of the instruction set that was chosen when the module was loaded.
const RowTable *table;
const DecodeKernels *kernels;

using Pair = std::pair<nb::handle, nb::handle>;  // weight and bias, either None
using NormOf = std::tuple<int, float, Pair>;     // kind, eps, scale
using ModeOf = std::tuple<int, int, bool>;       // gate, candidate, signed; a negative gate: an activation
using Indices = std::vector<int64_t>;

const float *read(const char *what, nb::handle x, int64_t count) { return reach<const float>(what, x, count); }

Weights weights(const Pair &of, int64_t weights, int64_t biases) {
    return {read("a weight", of.first, weights), read("a bias", of.second, biases)};
}

Projection projection(int64_t in, int64_t out, const Pair &of) {
    const Weights found = weights(of, in * out, out);
    return {in, out, found.weight, found.bias};
}

Norm norm(const NormOf &of, int64_t n) {
    return {static_cast<NormKind>(std::get<0>(of)), std::get<1>(of), weights(std::get<2>(of), n, n)};
}

// Raises unless each index lies in 0 .. count - 1.
void check(const char *what, const Indices &indices, int64_t count) {
    if (indices.empty()) return;
    const auto [low, high] = std::minmax_element(indices.begin(), indices.end());
    if (*low < 0 || *high >= count)
        throw std::out_of_range(std::string(what) + " must lie in 0 .. " + std::to_string(count - 1) + ", got " +
                                std::to_string(*low) + " .. " + std::to_string(*high));
}

// Of a branch: its window before and after the step, and its h before and after it.
using StateOf = std::tuple<nb::handle, nb::handle, nb::handle, nb::handle>;

// num_rows: of the states before the step.
BranchState branch_state(const Branch &b, int64_t num_rows, const StateOf &of) {
    const auto &[window, next_window, h, next_h] = of;
    return {read("a window", window, num_rows * b.window_size()), made<float>(next_window),
            read("h", h, num_rows * b.state_size()), made<float>(next_h)};
}

// tokens: one of each row, or empty where the inputs are projected. rows: of the states, a pool of pool_rows, which are
// advanced in place; empty: the states are the batch's, and those after the step lie elsewhere.
bool run_step(const FusedStep &step, int64_t num_rows, int threads, const Indices &tokens,
              const std::vector<nb::handle> &numbers, const std::vector<StateOf> &states, int64_t pool_rows,
              const Indices &rows, nb::handle y) {
    Inputs inputs{tokens, {}};
    if (static_cast<int64_t>(tokens.size()) != (step.embedding.weight ? num_rows : 0) ||
        static_cast<int64_t>(rows.size()) != (rows.empty() ? 0 : num_rows))
        throw std::invalid_argument("minrnn: a step must have one token and one row of the states for each row");
    check("tokens", tokens, step.embedding.count);
    check("rows", rows, pool_rows);
    for (std::size_t k = 0; k < step.inputs.size(); ++k)
        inputs.numbers.push_back(read("an input", numbers.at(k), num_rows * step.inputs[k].in));
    std::vector<BranchState> of;
    for (std::size_t i = 0; i < step.branches.size(); ++i)
        of.push_back(branch_state(step.branches[i], rows.empty() ? num_rows : pool_rows, states.at(i)));
    float *out = made<float>(y);
    nb::gil_scoped_release release;
    if (rows.empty()) return run(step, *table, *kernels, num_rows, {nullptr}, threads, inputs, of, out);
    return run_in_pool(step, *table, *kernels, rows, threads, inputs, of, out);
}

void add_branch(FusedStep &step, const NormOf &of, int64_t conv_width, Pair conv, int64_t wide, int64_t D, Pair up,
                Pair down, ModeOf mode, int num_pre, int activation, bool residual) {
    const int64_t n = step.d_model;
    const auto [gate, candidate, is_signed] = mode;
    step.branches.push_back({norm(of, n), {conv_width, weights(conv, conv_width * n, n)}, projection(n, wide, up),
                             projection(D, n, down), {gate, candidate, is_signed}, num_pre,
                             static_cast<Activation>(activation), residual});
}

}  // namespace

void bind_decode(nb::module_ m, Isa isa) {
    table = &rows_of(isa), kernels = &decode_of(isa);
    nb::class_<FusedStep>(m, "FusedStep")
        .def("__init__", [](FusedStep *step, int64_t d_model) { new (step) FusedStep{d_model, {}, {}, {}, {}, {}, {}}; })
        .def("embed", [](FusedStep &step, int64_t count, nb::handle weight) {
            step.embedding = {count, read("a weight", weight, count * step.d_model)};
        })
        .def("project", [](FusedStep &step, const std::vector<std::pair<int64_t, Pair>> &parts, const NormOf &of) {
            for (const auto &[in, part] : parts) step.inputs.push_back(projection(in, step.d_model, part));
            step.input_norm = norm(of, step.d_model);
        })
        .def("add_branch", &add_branch)
        .def("output", [](FusedStep &step, const NormOf &of, int64_t out, Pair part) {
            step.output_norm = norm(of, step.d_model);
            step.output = projection(step.d_model, out, part);
        })
        .def("run", &run_step);
}

}  // namespace minrnn
