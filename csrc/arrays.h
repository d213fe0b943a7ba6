// Arrays as the kernels' loops read them: pointers, sizes and strides; nothing of Python or torch.
#pragma once

#include <cstdint>

namespace minrnn {

// A (batch, T, n) array whose last axis is contiguous; strides count elements. data is null where there is none.
template <class X> struct Sequence {
    X *data;
    int64_t stride_b, stride_t;
    X *at(int64_t b, int64_t t) const { return data + b * stride_b + t * stride_t; }
    explicit operator bool() const { return data != nullptr; }
};

// A (batch, n) array whose last axis is contiguous.
template <class Real> struct States {
    Real *data;
    int64_t stride_b;
};

struct Resets {  // (batch, T) bytes, or null
    const uint8_t *data;
    int64_t stride_b, stride_t;
    bool at(int64_t b, int64_t t) const { return data && data[b * stride_b + t * stride_t]; }
};

constexpr int64_t kSerialBelow = 32768;  // elements of a gated scan: starting threads costs more than this much work

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace minrnn
