// One step of a model for a batch of rows, where nothing is kept for a backward pass:
//
//     x = embedding[token]     or     x = norm(sum_k W_k u_k + b_k)      input
//     x = [x +] W_out f(W_in conv(norm(x)) + b_in) + b_out               residual branches
//     y = W norm(x) + b                                                  output
//
// where f is an activation, or a gate and the state that it advances. In torch a step is some sixty small operations,
// each of which costs more to call than to compute; here they are fused. Rows are few, so most of the time goes into
// reading the weights, which are read once. Independent of Python and torch: pointers and sizes.
//
// The result of an overflow depends on the order of each sum, which is torch's own: a norm turns it into zeros here and
// NaN there, and an activation into zero. A step that comes near float's largest number reports that and has no result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "isa.h"
#include "rows.h"
#include "scan.h"
#include "threads.h"

namespace minrnn {

enum NormKind : int { kNoNorm, kLayerNorm, kRmsNorm };
enum Activation : int { kGelu, kRelu, kSilu, kSwiglu };

struct Weights {  // of each channel; either may be null
    const float *weight, *bias;
};

struct Norm {
    NormKind kind;
    float eps;
    Weights scale;
};

struct Projection {  // y = W x + b; W is (out, in), b may be null
    int64_t in, out;
    const float *weight, *bias;
};

struct Convolution {  // weight (width, in), the present step's first; width 0: none
    int64_t width;
    Weights of;
};

struct Embedding {  // (count, d_model)
    int64_t count;
    const float *weight;
};

// A branch's state before and after the step: of a convolution (rows, width - 1, in) and of a gate (rows, D).
struct BranchState {
    const float *window;  // null: zeros
    float *next_window;
    const float *h;  // null: zeros
    float *next_h;
};

struct DecodeKernels {
    bool (*normalise)(const Norm &norm, int64_t n, const float *x, float *y);  // y may be x; whether it is moderate
    void (*convolve)(const Convolution &conv, int64_t n, const float *x, const float *window, float *y);
    // Outputs [begin, end) of each row. `base`, where there is one, is added: (rows, out), as y, which it may be.
    void (*project)(const Projection &p, int64_t rows, int64_t begin, int64_t end, const float *x, const float *base,
                    float *y);
    // n outputs; swiglu takes 2 n inputs, the gate first.
    void (*activate)(Activation kind, int64_t n, const float *x, float *y);
    bool (*moderate)(int64_t n, const float *x);  // whether the magnitudes' sum is below kMost
};

struct Branch {
    Norm norm;
    Convolution conv;
    Projection up, down;
    Mode mode;  // gate negative: an activation instead
    int num_pre;
    Activation activation;
    bool residual;
    bool recurrent() const { return mode.gate >= 0; }
    // Floats of each row: of the convolution's window, of the gate's state, and of what a step computes in between.
    int64_t window_size() const { return std::max<int64_t>(conv.width - 1, 0) * up.in; }
    int64_t state_size() const { return recurrent() ? down.in : 0; }
    int64_t scratch_size() const { return 2 * up.in + up.out + 3 * down.in; }
};

constexpr float kMost = 1e36f;  // sums below it do not overflow in any order, but for what cancels
constexpr int64_t kBranchSerialBelow = 1 << 18;  // products: starting threads costs more than this much work
constexpr int64_t kOutputsAtOnce = 64;           // what a thread takes; a multiple of what the kernel takes

// Null: the numbers are too large.
inline const float *normalise(const DecodeKernels &kernels, const Norm &norm, int64_t rows, int64_t n, const float *x,
                              float *y) {
    if (norm.kind == kNoNorm) return x;
    for (int64_t r = 0; r < rows; ++r)
        if (!kernels.normalise(norm, n, x + r * n, y + r * n)) return nullptr;
    return y;
}

inline void project(const DecodeKernels &kernels, const Projection &p, int64_t rows, int threads, const float *x,
                    const float *base, float *y) {
    const int64_t parts = ceil_div(p.out, kOutputsAtOnce);
    if (rows * p.in * p.out < kBranchSerialBelow || threads == 1) return kernels.project(p, rows, 0, p.out, x, base, y);
    for_shares(parts, threads, [&](int64_t part) {
        const int64_t begin = part * kOutputsAtOnce;
        kernels.project(p, rows, begin, std::min(p.out, begin + kOutputsAtOnce), x, base, y);
    });
}

// Which row of the states before the step belongs to row r of the batch.
struct RowIndex {
    const int64_t *rows;  // null: r itself
    int64_t operator()(int64_t r) const { return rows ? rows[r] : r; }
};

// next_h = gate(pre, h), row by row, by the kernels of every other length. Returns whether it is finite.
inline bool advance(const RowTable &table, const Branch &b, int64_t rows, RowIndex index, const float *pre,
                    const BranchState &state, CarryRow<float> carry) {
    const RowKernels<float> &kernels = table.of<float>(b.mode);
    const int64_t D = b.down.in;
    for (int64_t r = 0; r < rows; ++r, pre += b.up.out) {
        fill(carry, D, 0.0f);
        if (state.h) std::copy_n(state.h + index(r) * D, D, carry.hi);
        float *next = state.next_h + r * D;
        const Rows<const float> of[3] = {{pre, 0}, {pre + D, 0}, {b.num_pre > 2 ? pre + 2 * D : nullptr, 0}};
        kernels.forward(D, 1, of, carry, {next, 0});
        if (!kernels.finite(D, carry.hi)) return false;
    }
    return true;
}

// The window moves on by the step that was just read.
inline void slide(int64_t width, int64_t n, const float *x, const float *window, float *next) {
    if (width < 2) return;
    const int64_t kept = (width - 2) * n;
    if (window)
        std::copy_n(window + n, kept, next);
    else
        std::fill_n(next, kept, 0.0f);
    std::copy_n(x, n, next + kept);
}

// x and y: (rows, d_model), contiguous, and not the same memory; scratch: rows * b.scratch_size() floats. Returns false
// where a number was too large.
inline bool run(const Branch &b, const RowTable &table, const DecodeKernels &kernels, int64_t rows, RowIndex index,
                int threads, const float *x, const BranchState &state, float *scratch, float *y) {
    const int64_t n = b.up.in, D = b.down.in;
    float *normed = scratch, *mixed = normed + rows * n, *pre = mixed + rows * n, *hidden = pre + rows * b.up.out,
          *carry = hidden + rows * D;
    const float *input = normalise(kernels, b.norm, rows, n, x, normed);
    if (!input) return false;
    if (b.conv.width) {
        const int64_t past = b.window_size();
        for (int64_t r = 0; r < rows; ++r) {
            const float *window = state.window ? state.window + index(r) * past : nullptr;
            kernels.convolve(b.conv, n, input + r * n, window, mixed + r * n);
            slide(b.conv.width, n, input + r * n, window, state.next_window + r * past);
        }
        input = mixed;
    }
    project(kernels, b.up, rows, threads, input, nullptr, pre);
    if (!kernels.moderate(rows * b.up.out, pre)) return false;
    if (b.recurrent()) {
        if (!advance(table, b, rows, index, pre, state, {carry, carry + D})) return false;
        hidden = state.next_h;
    } else {
        for (int64_t r = 0; r < rows; ++r) kernels.activate(b.activation, D, pre + r * b.up.out, hidden + r * D);
    }
    project(kernels, b.down, rows, threads, hidden, b.residual ? x : nullptr, y);
    return true;
}

struct FusedStep {
    int64_t d_model;
    Embedding embedding;             // of no weight: the inputs are projected
    std::vector<Projection> inputs;
    Norm input_norm;
    std::vector<Branch> branches;
    Norm output_norm;
    Projection output;
};

struct Inputs {
    std::vector<int64_t> tokens;        // of each row, below embedding.count
    std::vector<const float *> numbers;  // what each projection reads
};

// x: (rows, d_model). Returns false where a number was too large.
inline bool embed(const FusedStep &step, const DecodeKernels &kernels, int64_t rows, int threads, const Inputs &inputs,
                  float *x) {
    const int64_t n = step.d_model;
    if (step.embedding.weight) {
        for (int64_t r = 0; r < rows; ++r) std::copy_n(step.embedding.weight + inputs.tokens[r] * n, n, x + r * n);
        return true;
    }
    for (size_t k = 0; k < step.inputs.size(); ++k)
        project(kernels, step.inputs[k], rows, threads, inputs.numbers[k], k ? x : nullptr, x);
    return normalise(kernels, step.input_norm, rows, n, x, x) != nullptr;
}

// states: one of each branch; y: (rows, output.out). Returns false where a number was too large.
inline bool run(const FusedStep &step, const RowTable &table, const DecodeKernels &kernels, int64_t rows, RowIndex index,
                int threads, const Inputs &inputs, const std::vector<BranchState> &states, float *y) {
    const int64_t size = rows * step.d_model;
    int64_t most = step.d_model;
    for (const Branch &b : step.branches) most = std::max(most, b.scratch_size());
    thread_local std::vector<float> scratch;
    if (scratch.size() < static_cast<size_t>(2 * size + rows * most)) scratch.resize(2 * size + rows * most);
    float *x = scratch.data(), *other = x + size, *rest = other + size;
    if (!embed(step, kernels, rows, threads, inputs, x)) return false;
    for (size_t i = 0; i < step.branches.size(); ++i) {
        if (!run(step.branches[i], table, kernels, rows, index, threads, x, states[i], rest, other)) return false;
        std::swap(x, other);
    }
    const float *normed = normalise(kernels, step.output_norm, rows, step.d_model, x, rest);
    if (!normed) return false;
    project(kernels, step.output, rows, threads, normed, nullptr, y);
    return kernels.moderate(rows * step.output.out, y);
}

inline void scatter(const std::vector<int64_t> &rows, int64_t n, const float *from, float *to) {
    for (size_t r = 0; r < rows.size(); ++r) std::copy_n(from + r * n, n, to + rows[r] * n);
}

// As `run`, in place: the states are a pool's, of which `rows` are advanced. They are written once the step has succeeded.
inline bool run_in_pool(const FusedStep &step, const RowTable &table, const DecodeKernels &kernels,
                        const std::vector<int64_t> &rows, int threads, const Inputs &inputs,
                        const std::vector<BranchState> &pool, float *y) {
    const int64_t count = static_cast<int64_t>(rows.size());
    int64_t size = 0;
    for (const Branch &b : step.branches) size += count * (b.window_size() + b.state_size());
    thread_local std::vector<float> scratch;
    if (scratch.size() < static_cast<size_t>(size)) scratch.resize(size);
    std::vector<BranchState> states = pool;
    float *next = scratch.data();
    for (size_t i = 0; i < states.size(); ++i) {
        states[i].next_window = next;
        states[i].next_h = next += count * step.branches[i].window_size();
        next += count * step.branches[i].state_size();
    }
    if (!run(step, table, kernels, count, {rows.data()}, threads, inputs, states, y)) return false;
    for (size_t i = 0; i < states.size(); ++i) {
        scatter(rows, step.branches[i].window_size(), states[i].next_window, pool[i].next_window);
        scatter(rows, step.branches[i].state_size(), states[i].next_h, pool[i].next_h);
    }
    return true;
}

MINRNN_KERNELS(DecodeKernels, decode)

}  // namespace minrnn
