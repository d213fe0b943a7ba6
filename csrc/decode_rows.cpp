// The loops of a model's step, compiled with -DMINRNN_ISA=<name> and that instruction set's flags.
#include "decode.h"

#include <cmath>
#include <type_traits>

#include "gates.h"

namespace minrnn {
namespace {

constexpr int64_t kWidth = kLanes<Floats>;
constexpr int kTogether = kRegister == 64 ? 4 : 2;  // rows: their sums for four outputs fill half of the registers

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

using Quad = float __attribute__((vector_size(16)));

// Halves added to each other, down to four lanes.
template <int bytes> struct Halved {
    typedef float V __attribute__((vector_size(bytes)));  // in a "using" GCC 12 overlooks the size
    static MINRNN_INLINE Quad folded(V x) {
        typename Halved<bytes / 2>::V parts[2];
        std::memcpy(parts, &x, sizeof x);
        return Halved<bytes / 2>::folded(parts[0] + parts[1]);
    }
};
template <> struct Halved<16> {
    using V = Quad;
    static MINRNN_INLINE Quad folded(Quad x) { return x; }
};

MINRNN_INLINE float sum(Floats x) {
    const Quad q = Halved<kRegister>::folded(x);
    return (q[0] + q[2]) + (q[1] + q[3]);
}

// Four lanes of eight: those of a, then those of b.
template <int i, int j, int k, int l> MINRNN_INLINE Quad pick(Quad a, Quad b) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, i, j, k, l);
#else
    typedef int32_t Places __attribute__((vector_size(16)));
    return __builtin_shuffle(a, b, Places{i, j, k, l});
#endif
}

// The sums of four registers, each in the order of `sum`. One at a time they take an eighth of a step of 64 rows of width
// 512 with AVX-512, and a quarter at width 192.
MINRNN_INLINE Quad sums(const Floats *x) {
    Quad q[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) q[i] = Halved<kRegister>::folded(x[i]);
    const Quad a = pick<0, 1, 4, 5>(q[0], q[1]) + pick<2, 3, 6, 7>(q[0], q[1]);
    const Quad b = pick<0, 1, 4, 5>(q[2], q[3]) + pick<2, 3, 6, 7>(q[2], q[3]);
    return pick<0, 2, 4, 6>(a, b) + pick<1, 3, 5, 7>(a, b);
}

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

// `count` neighboring outputs of a row: the sums of their products, a bias and what they are added to; either is null
// where there is none.
template <int count>
MINRNN_INLINE void finish(const Floats *products, const float *bias, const float *base, float *y) {
    using Result = std::conditional_t<count % 4, float, Quad>;
    constexpr int width = sizeof(Result) / sizeof(float);
    for (int k = 0; k < count; k += width) {
        Result result, term;
        if constexpr (width == 4) result = sums(products + k);
        else result = sum(products[k]);
        for (const float *each : {bias, base})
            if (each) {
                std::memcpy(&term, each + k, sizeof term);
                result += term;
            }
        std::memcpy(y + k, &result, sizeof result);
    }
}

// `count` neighboring outputs of `together` rows. Each sum has one order, however many rows there are. The weights of the
// next outputs are fetched meanwhile: a row of weights is too short for the processor to see a stream in it.
template <int count, int together>
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
            __builtin_prefetch(weight + (count + k) * p.in + d, 0, 2);
#pragma GCC unroll 4
            for (int r = 0; r < together; ++r) products[r][k] += w * inputs[r];
        }
    });
    for (int r = 0; r < together; ++r) {
        const int64_t at = (row + r) * p.out + first;
        finish<count>(products[r], p.bias ? p.bias + first : nullptr, base ? base + at : nullptr, y + at);
    }
}

// `count` outputs of the rows from `row` on: their weights come from memory once, and then from the nearest cache.
template <int count, int together>
MINRNN_INLINE void of_rows(const Projection &p, int64_t row, int64_t rows, int64_t first, const float *x,
                           const float *base, float *y) {
    for (; row + together <= rows; row += together) outputs<count, together>(p, row, first, x, base, y);
    if constexpr (together > 1) of_rows<count, together / 2>(p, row, rows, first, x, base, y);
}

void project(const Projection &p, int64_t rows, int64_t begin, int64_t end, const float *x, const float *base,
             float *y) {
    constexpr int count = 4;
    for (; begin + count <= end; begin += count) of_rows<count, kTogether>(p, 0, rows, begin, x, base, y);
    for (; begin < end; ++begin) of_rows<1, kTogether>(p, 0, rows, begin, x, base, y);
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
