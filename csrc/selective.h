// The selective scan of Mamba: what its kernels are told, and how batch and channels are shared out among threads.
//
//     delta = softplus(delta_pre + bias);  h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t]
//     y[t] = (sum_n C[t] h[t] + D u[t]) silu(z[t])
//
// The state has N numbers a channel and never exists for all steps: forward keeps it at the first step of every chunk,
// and backward computes the steps of one chunk again from there. Time is not cut over threads. Sums over channels and
// batch rows are added up in an order that does not depend on the threads, so equal calls give equal bits.
// Knows pointers, sizes and strides; nothing of Python or torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "isa.h"

namespace minrnn::selective {

// A (B, T, n) array whose last axis is contiguous; strides count elements.
template <class T> struct Rows {
    T *data;
    int64_t stride_b, stride_t;
    T *at(int64_t b, int64_t t) const { return data + b * stride_b + t * stride_t; }
    explicit operator bool() const { return data != nullptr; }
};

template <class Real> struct Inputs {
    int64_t B, T, D, N, chunk;
    Rows<const Real> u, delta_pre, z;  // (B, T, D); z may be null
    Rows<const Real> into, from;       // (B, T, N): the paper's B and C
    const Real *A;                     // (D, N)
    const Real *skip;                  // (D), the paper's D, or null
    const Real *bias;                  // (D), added to delta_pre, or null
    const Real *h0;                    // (B, D, N), or null
    Rows<const uint8_t> reset;         // (B, T), or null
    bool resets(int64_t b, int64_t t) const { return reset && *reset.at(b, t); }
    int64_t num_chunks() const { return (T + chunk - 1) / chunk; }
};

template <class Real> struct ForwardCall {
    Inputs<Real> in;
    Rows<Real> y;      // (B, T, D)
    Real *last;        // (B, D, N): the final state
    Real *borders;     // (B, num_chunks * N, D): the state before each chunk, or null
};

template <class Real> struct BackwardCall {
    Inputs<Real> in;
    Rows<const Real> dy;
    const Real *dlast, *borders;
    Rows<Real> du, ddelta_pre, dz;
    Real *dinto, *dfrom;  // (groups, B, T, N): a part of the sum for each group of channels
    double *dA, *dskip;   // (B, N, D) and (B, D): a part of the sum for each row of the batch
    Real *dh0;            // (B, D, N)
};

// A call serves the channels [d, d + n) of batch row b. `workspace` is aligned to 64 bytes; its size is in elements.
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

#define MINRNN_DECLARE_SELECTIVE(isa) \
    namespace isa {                   \
    extern const Table table;         \
    }
MINRNN_FOR_EACH_ISA(MINRNN_DECLARE_SELECTIVE)
#undef MINRNN_DECLARE_SELECTIVE

// One job is a group of neighbouring channels of one batch row; 64 channels fill four vectors of the widest kind.
// There are several groups to a row only where rows alone could not occupy the threads of a large machine, because
// each needs its own part of the gradients of B and C. The number of threads has no say: bits must not depend on it.
constexpr int64_t kGroup = 64;
constexpr int64_t kJobsWanted = 16;
constexpr int64_t kSerialBelow = 1 << 16;  // state elements: starting threads costs more than this much work

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t group_width(int64_t B, int64_t D) {
    const int64_t most = ceil_div(D, kGroup), wanted = std::clamp<int64_t>(ceil_div(kJobsWanted, B), 1, most);
    return ceil_div(most, wanted) * kGroup;
}

inline int64_t num_groups(int64_t B, int64_t D) { return ceil_div(D, group_width(B, D)); }

template <class Real> class Workspaces {  // one for each thread
  public:
    Workspaces(int threads, int64_t size) : stride_((size * sizeof(Real) + 63) / 64 * 64) {
        data_ = static_cast<char *>(std::aligned_alloc(64, stride_ * threads));
        if (data_ == nullptr) throw std::bad_alloc();
    }
    ~Workspaces() { std::free(data_); }
    Workspaces(const Workspaces &) = delete;
    Workspaces &operator=(const Workspaces &) = delete;
    Real *mine() const {
#ifdef _OPENMP
        return reinterpret_cast<Real *>(data_ + stride_ * omp_get_thread_num());
#else
        return reinterpret_cast<Real *>(data_);
#endif
    }

  private:
    std::size_t stride_;
    char *data_;
};

template <class Real, class Job>
void for_each_job(const Inputs<Real> &in, int64_t width, int threads, int64_t workspace, Job &&job) {
    const int64_t groups = ceil_div(in.D, width), jobs = in.B * groups;
    const bool small = in.B * in.T * in.D * in.N < kSerialBelow;
    threads = small ? 1 : static_cast<int>(std::min<int64_t>(threads, jobs));
    const Workspaces<Real> workspaces(threads, workspace);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
    for (int64_t j = 0; j < jobs; ++j) {
        const int64_t d = (j % groups) * width;
        job(j / groups, d, std::min(width, in.D - d), j % groups, workspaces.mine());
    }
}

template <class Real> void forward(const ForwardCall<Real> &call, const Kernels<Real> &kernels, int threads) {
    int64_t width = kGroup;  // bits do not depend on it: no sum runs over channels
    while (width > kGroup / 4 && call.in.B * ceil_div(call.in.D, width) < 2 * threads) width /= 2;
    for_each_job(call.in, width, threads, kernels.forward_workspace(call.in.N),
                 [&](int64_t b, int64_t d, int64_t n, int64_t, Real *workspace) {
                     kernels.forward(call, b, d, n, workspace);
                 });
}

template <class Real> void backward(const BackwardCall<Real> &call, const Kernels<Real> &kernels, int threads) {
    const int64_t width = group_width(call.in.B, call.in.D);
    for_each_job(call.in, width, threads, kernels.backward_workspace(call.in.N, call.in.chunk, width),
                 [&](int64_t b, int64_t d, int64_t n, int64_t group, Real *workspace) {
                     kernels.backward(call, b, d, n, group, workspace);
                 });
}

}  // namespace minrnn::selective
