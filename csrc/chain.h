// One step of a model, where nothing is kept for a backward pass: a chain of
//
//     x = norm(sum_k W_k u_k + b_k)                                  its start, or x as it is given
//     x = [x +] W_out f(W_in conv(norm(x)) + b_in) + b_out           branches
//     y = W norm(x) + b                                              its end, or x as it is then
//
// where f is an activation, or a gate and the state that it advances. A step is some sixty small operations, each of
// which costs more to call than to compute; here all of them are one. Rows are few, so that what takes time is to read
// the weights, and they are read once. Knows pointers and sizes; nothing of Python or torch.
//
// Numbers have to stay far from float's largest. What comes of an overflow depends on the order of each sum, which is
// torch's own: a norm makes of it zeros here and NaN there, and an activation zero. A step that meets one says so, and
// has computed nothing of use.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "isa.h"
#include "rows.h"
#include "scan.h"

namespace minrnn {

enum NormKind : int { kNoNorm, kLayerNorm, kRmsNorm };
enum Activation : int { kGelu, kRelu, kSilu, kSwiglu };

struct Affine {  // of each channel; either may be null
    const float *weight, *bias;
};

struct Norm {
    NormKind kind;
    float eps;
    Affine scale;
};

struct Projection {  // y = W x + b; W is (out, in), b may be null
    int64_t in, out;
    const float *weight, *bias;
};

struct Convolution {  // weight (width, in), the present step's first; width 0: none
    int64_t width;
    Affine of;
};

struct BranchStates {  // of a convolution (rows, width - 1, in) and of a gate (rows, D), before and after the step
    const float *window;  // null: zeros
    float *next_window;
    const float *h;  // null: zeros
    float *next_h;
};

struct ChainKernels {
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
    // Floats that a step needs for each row.
    int64_t room() const { return 2 * up.in + up.out + 3 * down.in; }
};

constexpr float kMost = 1e36f;  // sums below it do not overflow in any order, but for what cancels
constexpr int64_t kBranchSerialBelow = 1 << 18;  // products: starting threads costs more than this much work
constexpr int64_t kOutputsAtOnce = 64;           // what a thread takes; a multiple of what the kernel takes

// Null: the numbers are too large.
inline const float *normalise(const ChainKernels &kernels, const Norm &norm, int64_t rows, int64_t n, const float *x,
                              float *y) {
    if (norm.kind == kNoNorm) return x;
    for (int64_t r = 0; r < rows; ++r)
        if (!kernels.normalise(norm, n, x + r * n, y + r * n)) return nullptr;
    return y;
}

inline void project(const ChainKernels &kernels, const Projection &p, int64_t rows, int threads, const float *x,
                    const float *base, float *y) {
    const int64_t parts = ceil_div(p.out, kOutputsAtOnce);
    if (rows * p.in * p.out < kBranchSerialBelow || threads == 1) return kernels.project(p, rows, 0, p.out, x, base, y);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t begin = part * kOutputsAtOnce;
        kernels.project(p, rows, begin, std::min(p.out, begin + kOutputsAtOnce), x, base, y);
    }
}

// next_h = gate(pre, h), row by row, by the kernels of every other length. Returns whether it is finite.
inline bool advance(const RowTable &table, const Branch &b, int64_t rows, const float *pre, const BranchStates &states,
                    CarryRow<float> carry) {
    const RowKernels<float> &kernels = table.of<float>(b.mode);
    const int64_t D = b.down.in;
    for (int64_t r = 0; r < rows; ++r, pre += b.up.out) {
        fill(carry, D, 0.0f);
        if (states.h) std::copy_n(states.h + r * D, D, carry.hi);
        float *next = states.next_h + r * D;
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

// x and y: (rows, d_model), contiguous, and not the same memory; room: rows * b.room() floats. Returns whether all went
// well: no number was too large.
inline bool run(const Branch &b, const RowTable &table, const ChainKernels &kernels, int64_t rows, int threads,
                const float *x, const BranchStates &states, float *room, float *y) {
    const int64_t n = b.up.in, D = b.down.in;
    float *normed = room, *mixed = normed + rows * n, *pre = mixed + rows * n, *hidden = pre + rows * b.up.out,
          *carry = hidden + rows * D;
    const float *input = normalise(kernels, b.norm, rows, n, x, normed);
    if (!input) return false;
    if (b.conv.width) {
        const int64_t past = (b.conv.width - 1) * n;
        for (int64_t r = 0; r < rows; ++r) {
            const float *window = states.window ? states.window + r * past : nullptr;
            kernels.convolve(b.conv, n, input + r * n, window, mixed + r * n);
            slide(b.conv.width, n, input + r * n, window, states.next_window + r * past);
        }
        input = mixed;
    }
    project(kernels, b.up, rows, threads, input, nullptr, pre);
    if (!kernels.moderate(rows * b.up.out, pre)) return false;
    if (b.recurrent()) {
        if (!advance(table, b, rows, pre, states, {carry, carry + D})) return false;
        hidden = states.next_h;
    } else {
        for (int64_t r = 0; r < rows; ++r) kernels.activate(b.activation, D, pre + r * b.up.out, hidden + r * D);
    }
    project(kernels, b.down, rows, threads, hidden, b.residual ? x : nullptr, y);
    return true;
}

struct Chain {
    int64_t d_model;
    std::vector<Projection> start;  // empty: x is given
    Norm start_norm;
    std::vector<Branch> branches;
    Projection end;  // of no weight: y is x
    Norm end_norm;
};

// inputs: what each projection of the start reads, or x alone; states: one of each branch. Returns whether all went well.
inline bool run(const Chain &chain, const RowTable &table, const ChainKernels &kernels, int64_t rows, int threads,
                const std::vector<const float *> &inputs, const std::vector<BranchStates> &states, float *y) {
    const int64_t size = rows * chain.d_model;
    int64_t room = chain.d_model;
    for (const Branch &b : chain.branches) room = std::max(room, b.room());
    thread_local std::vector<float> scratch;
    if (scratch.size() < static_cast<size_t>(2 * size + rows * room)) scratch.resize(2 * size + rows * room);
    float *x = scratch.data(), *other = x + size, *rest = other + size;
    const float *from = inputs.front();
    if (!chain.start.empty()) {
        for (size_t k = 0; k < chain.start.size(); ++k)
            project(kernels, chain.start[k], rows, threads, inputs[k], k ? x : nullptr, x);
        if (!normalise(kernels, chain.start_norm, rows, chain.d_model, x, x)) return false;
        from = x;
    }
    for (size_t i = 0; i < chain.branches.size(); ++i) {
        if (!run(chain.branches[i], table, kernels, rows, threads, from, states[i], rest, other)) return false;
        from = other;
        std::swap(x, other);
    }
    if (!chain.end.weight) {
        std::copy_n(from, size, y);
        return kernels.moderate(size, y);
    }
    from = normalise(kernels, chain.end_norm, rows, chain.d_model, from, rest);
    if (!from) return false;
    project(kernels, chain.end, rows, threads, from, nullptr, y);
    return kernels.moderate(rows * chain.end.out, y);
}

MINRNN_KERNELS(ChainKernels, chain)

}  // namespace minrnn
