// The loops of a model's step, compiled with -DMINRNN_ISA=<name> and that instruction set's flags.
#include "decode.h"

#include <cmath>

#include "gates.h"

namespace minrnn {
namespace {

constexpr int64_t kWidth = kLanes<Floats>;

// Calls f(d, lanes) for each register of a row of n channels; the last may hold fewer.
template <class F> MINRNN_INLINE void for_lanes(int64_t n, F &&f) {
    int64_t d = 0;
    for (; d + kWidth <= n; d += kWidth) f(d, All{});
    if (d < n) f(d, n - d);
}

// The lanes that a row has, and zero in those that it has not.
MINRNN_INLINE Floats first(Floats x, All) { return x; }
MINRNN_INLINE Floats first(Floats x, int64_t n) {
    float lanes[kWidth] = {};
    store(x, lanes, n);
    return load(lanes);
}

template <int bytes> struct Halved {
    typedef float V __attribute__((vector_size(bytes)));  // in a "using" GCC 12 overlooks the size
    static MINRNN_INLINE float sum(V x) {
        typename Halved<bytes / 2>::V parts[2];
        std::memcpy(parts, &x, sizeof x);
        return Halved<bytes / 2>::sum(parts[0] + parts[1]);
    }
};
template <> struct Halved<8> {
    using V = float __attribute__((vector_size(8)));
    static MINRNN_INLINE float sum(V x) { return x[0] + x[1]; }
};

MINRNN_INLINE float sum(Floats x) { return Halved<kRegister>::sum(x); }

bool normalise(const Norm &norm, int64_t n, const float *x, float *y) {
    float mean = 0;
    if (norm.kind == kLayerNorm) {
        Floats total{};
        for_lanes(n, [&](int64_t d, auto lanes) { total += load(x + d, lanes); });
        mean = sum(total) / static_cast<float>(n);
    }
    Floats squares{};
    for_lanes(n, [&](int64_t d, auto lanes) {
        const Floats centred = first(load(x + d, lanes) - mean, lanes);
        squares += centred * centred;
    });
    const float total = sum(squares), count = static_cast<float>(n), scale = 1 / std::sqrt(total / count + norm.eps);
    for_lanes(n, [&](int64_t d, auto lanes) {
        Floats z = (load(x + d, lanes) - mean) * scale;
        if (norm.scale.weight) z *= load(norm.scale.weight + d, lanes);
        if (norm.scale.bias) z += load(norm.scale.bias + d, lanes);
        store(z, y + d, lanes);
    });
    return total + count * mean * mean < kMost;  // torch squares its parts of the mean
}

bool moderate(int64_t n, const float *x) {
    Floats total{};
    for_lanes(n, [&](int64_t d, auto lanes) { total -= minus_absolute(first(load(x + d, lanes), lanes)); });
    return sum(total) < kMost;  // no NaN is
}

void convolve(const Convolution &conv, int64_t n, const float *x, const float *window, float *y) {
    for_lanes(n, [&](int64_t d, auto lanes) {
        Floats sum = load(x + d, lanes) * load(conv.of.weight + d, lanes);
        if (conv.of.bias) sum += load(conv.of.bias + d, lanes);
        for (int64_t lag = 1; window && lag < conv.width; ++lag)
            sum += load(window + (conv.width - 1 - lag) * n + d, lanes) * load(conv.of.weight + lag * n + d, lanes);
        store(sum, y + d, lanes);
    });
}

// `count` neighboring outputs of `together` rows. Each sum has one order, however many rows there are. With `ahead` the
// next outputs' weights are fetched: a row of weights is too short for the processor to see a stream in it.
template <int count, int together, bool ahead>
MINRNN_INLINE void outputs(const Projection &p, int64_t row, int64_t first, const float *x, const float *base,
                           float *y) {
    const float *weight = p.weight + first * p.in;
    x += row * p.in;
    Floats products[together][count] = {};
    for_lanes(p.in, [&](int64_t d, auto lanes) {
        Floats inputs[together];
#pragma GCC unroll 4
        for (int r = 0; r < together; ++r) inputs[r] = load(x + r * p.in + d, lanes);
#pragma GCC unroll 4
        for (int k = 0; k < count; ++k) {
            const Floats w = load(weight + k * p.in + d, lanes);
            if (ahead) __builtin_prefetch(weight + (count + k) * p.in + d, 0, 2);
#pragma GCC unroll 4
            for (int r = 0; r < together; ++r) products[r][k] += w * inputs[r];
        }
    });
    for (int r = 0; r < together; ++r)
        for (int k = 0; k < count; ++k) {
            const int64_t at = (row + r) * p.out + first + k;
            y[at] = sum(products[r][k]) + (p.bias ? p.bias[first + k] : 0.0f) + (base ? base[at] : 0.0f);
        }
}

// `count` outputs of every row: their weights come from memory once, and then from the nearest cache.
template <int count>
MINRNN_INLINE void of_every_row(const Projection &p, int64_t rows, int64_t first, const float *x, const float *base,
                                float *y) {
    int64_t row = 0;
    if (rows >= 2) {
        outputs<count, 2, true>(p, row, first, x, base, y);
        row = 2;
    }
    for (; row + 2 <= rows; row += 2) outputs<count, 2, false>(p, row, first, x, base, y);
    if (row < rows) outputs<count, 1, true>(p, row, first, x, base, y);
}

void project(const Projection &p, int64_t rows, int64_t begin, int64_t end, const float *x, const float *base,
             float *y) {
    constexpr int count = 4;
    for (; begin + count <= end; begin += count) of_every_row<count>(p, rows, begin, x, base, y);
    for (; begin < end; ++begin) of_every_row<1>(p, rows, begin, x, base, y);
}

// x Phi(x), Phi the normal distribution's function. Phi(-|x|) exp(x^2 / 2) is a polynomial in 1 / (1 + 0.35 |x|), fitted
// for |x| < 14 (minimax, 3e-8 relative): so nothing cancels below zero. Exponentials end at 1e-38, and x is bounded where
// they do, here and in silu: they would come to something again as a factor of a large number.
MINRNN_INLINE Floats gelu(Floats x) {
    constexpr float poly[] = {0.13962140424255243f, 0.13986187063148067f,  0.11983286072708858f,
                              0.10550803136573085f, -0.02310990000384805f, 0.1591742555013213f,
                              -0.25571433876822824f, 0.14397173932128166f, -0.02914593896363099f};
    const Floats size = -at_least(minus_absolute(x), -20.0f);  // an infinity would be NaN
    const Floats w = reciprocal(1 + 0.35f * size);
    Floats q = splat<Floats>(poly[8]);
#pragma GCC unroll 8
    for (int i = 7; i >= 0; --i) q = q * w + poly[i];
    const Floats tail = exp_nonpositive(-0.5f * size * size) * (q * w);
    return at_least(x, -20.0f) * (x < 0 ? tail : 1 - tail);
}

MINRNN_INLINE Floats silu(Floats x) { return at_least(x, -100.0f) * Sigmoid<Floats>(x).value(); }

template <class F> void map(int64_t n, const float *x, float *y, F &&f) {
    for_lanes(n, [&](int64_t d, auto lanes) { store(f(load(x + d, lanes)), y + d, lanes); });
}

void activate(Activation kind, int64_t n, const float *x, float *y) {
    switch (kind) {
        case kGelu: return map(n, x, y, [](Floats x) { return gelu(x); });
        case kRelu: return map(n, x, y, [](Floats x) { return at_least(x, 0.0f); });
        case kSilu: return map(n, x, y, [](Floats x) { return silu(x); });
        case kSwiglu:
            return for_lanes(n, [&](int64_t d, auto lanes) {
                store(silu(load(x + d, lanes)) * load(x + n + d, lanes), y + d, lanes);
            });
    }
}

}  // namespace

namespace MINRNN_ISA {
extern constexpr DecodeKernels decode{normalise, convolve, project, activate, moderate};
}

}  // namespace minrnn
