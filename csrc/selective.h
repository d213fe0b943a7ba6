// The selective scan of Mamba: its kernels' arguments, and how batch and channels are divided among threads.
//
//     delta = softplus(delta_pre + bias);  h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t]
//     y[t] = (sum_n C[t] h[t] + D u[t]) silu(z[t])
//
// The state has N numbers a channel and never exists for all steps: forward keeps it at the first step of every chunk,
// and backward recomputes one chunk's steps from there. Time is not divided among threads. Sums over channels and
// batch rows are added up in an order that does not depend on the threads, so equal calls give equal bits.
// Independent of Python and torch: pointers, sizes and strides.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>

#include "arrays.h"
#include "isa.h"
#include "threads.h"

namespace minrnn::selective {

template <class Real> struct Inputs {
    int64_t batch, T, channels, N, chunk;
    Sequence<const Real> u, delta_pre, z;  // (batch, T, channels); z may be null
    Sequence<const Real> B, C;             // (batch, T, N)
    const Real *A;                         // (channels, N)
    const Real *skip;                      // (channels), the paper's D, or null
    const Real *bias;                      // (channels), added to delta_pre, or null
    const Real *h0;                        // (batch, channels, N), or null
    Resets reset;
    int64_t num_chunks() const { return ceil_div(T, chunk); }
};

template <class Real> struct ForwardCall {
    Inputs<Real> in;
    Sequence<Real> y;  // (batch, T, channels)
    Real *last;        // (batch, channels, N): the final state
    Real *borders;     // (batch, num_chunks * N, channels): the state before each chunk, or null
};

template <class Real> struct BackwardCall {
    Inputs<Real> in;
    Sequence<const Real> dy;
    const Real *dlast, *borders;
    Sequence<Real> du, ddelta_pre, dz;
    Real *dB, *dC;       // (groups, batch, T, N): a part of the sum for each group of channels
    double *dA, *dskip;  // (batch, N, channels) and (batch, channels): a part of the sum for each row of the batch
    Real *dh0;           // (batch, channels, N)
};

// A call computes the channels [d, d + n) of batch row b. `workspace` is aligned to 64 bytes; its size is in elements.
template <class Real> struct Kernels {
    int64_t (*forward_workspace)(int64_t N);
    int64_t (*backward_workspace)(int64_t N, int64_t chunk, int64_t n);
    void (*forward)(const ForwardCall<Real> &, int64_t b, int64_t d, int64_t n, Real *workspace);
    void (*backward)(const BackwardCall<Real> &, int64_t b, int64_t d, int64_t n, int64_t group, Real *workspace);
};

struct Table {
    Kernels<float> single;
    Kernels<double> full;
};

MINRNN_KERNELS(Table, table)

// One job is a group of neighboring channels of one batch row; 64 channels fill four vectors of the widest kind.
// There are several groups to a row only where rows alone could not occupy the threads of a large machine, because
// each needs its own part of the gradients of B and C. The number of threads plays no part: bits must not depend on it.
constexpr int64_t kGroup = 64;
constexpr int64_t kJobsWanted = 16;

inline int64_t group_width(int64_t batch, int64_t channels) {
    const int64_t most = ceil_div(channels, kGroup), wanted = std::clamp<int64_t>(ceil_div(kJobsWanted, batch), 1, most);
    return ceil_div(most, wanted) * kGroup;
}

inline int64_t num_groups(int64_t batch, int64_t channels) { return ceil_div(channels, group_width(batch, channels)); }

template <class Real> class Workspaces {  // one for each thread
  public:
    Workspaces(int threads, int64_t size)
        : stride_((size * sizeof(Real) + 63) / 64 * 64),
          data_(static_cast<char *>(::operator new(stride_ * threads, kLine))) {}
    ~Workspaces() { ::operator delete(data_, kLine); }
    Workspaces(const Workspaces &) = delete;
    Workspaces &operator=(const Workspaces &) = delete;
    Real *of(int thread) const { return reinterpret_cast<Real *>(data_ + stride_ * thread); }

  private:
    static constexpr std::align_val_t kLine{64};
    std::size_t stride_;
    char *data_;
};

template <class Real, class Job>
void for_each_job(const Inputs<Real> &in, int64_t width, int threads, int64_t workspace, Job &&job) {
    const int64_t groups = ceil_div(in.channels, width), jobs = in.batch * groups;
    const bool small = in.batch * in.T * in.channels * in.N < 2 * kSerialBelow;  // a state is half an element's work
    threads = small ? 1 : static_cast<int>(std::min<int64_t>(threads, jobs));
    const Workspaces<Real> workspaces(threads, workspace);
    for_each(jobs, threads, [&](int64_t j, int thread) {
        const int64_t d = (j % groups) * width;
        job(j / groups, d, std::min(width, in.channels - d), j % groups, workspaces.of(thread));
    });
}

template <class Real> void forward(const ForwardCall<Real> &call, const Kernels<Real> &kernels, int threads) {
    int64_t width = kGroup;  // bits do not depend on it: no sum runs over channels
    while (width > kGroup / 4 && call.in.batch * ceil_div(call.in.channels, width) < 2 * threads) width /= 2;
    for_each_job(call.in, width, threads, kernels.forward_workspace(call.in.N),
                 [&](int64_t b, int64_t d, int64_t n, int64_t, Real *workspace) {
                     kernels.forward(call, b, d, n, workspace);
                 });
}

template <class Real> void backward(const BackwardCall<Real> &call, const Kernels<Real> &kernels, int threads) {
    const int64_t width = group_width(call.in.batch, call.in.channels);
    for_each_job(call.in, width, threads, kernels.backward_workspace(call.in.N, call.in.chunk, width),
                 [&](int64_t b, int64_t d, int64_t n, int64_t group, Real *workspace) {
                     kernels.backward(call, b, d, n, group, workspace);
                 });
}

}  // namespace minrnn::selective
