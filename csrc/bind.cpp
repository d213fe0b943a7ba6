// The Python module minrnn.ops._cpu: raw pointers in, nothing out. The only file here that knows Python.
//
// Nothing is checked: src/minrnn/ops/cpu.py passes what scan.py has checked, and ops/chain.py what it has itself.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "chain.h"
#include "memory.h"
#include "scan.h"

namespace nb = nanobind;

namespace minrnn {
namespace {

// Of the instruction set that was chosen when the module was loaded.
const RowTable *rows;
const ChainKernels *chain_kernels;

void serve(Isa isa) {
    switch (isa) {
#ifdef MINRNN_X86
        case Isa::avx512_bf16: rows = &avx512_bf16::rows, chain_kernels = &avx512_bf16::chain; return;
        case Isa::avx512: rows = &avx512::rows, chain_kernels = &avx512::chain; return;
        case Isa::avx2: rows = &avx2::rows, chain_kernels = &avx2::chain; return;
#endif
        default: rows = &baseline::rows, chain_kernels = &baseline::chain;
    }
}

using Address = std::uintptr_t;
using Strided = std::array<int64_t, 3>;  // address, batch stride, time stride (in elements)

template <class IO> Sequence<IO> sequence(const Strided &s) {
    return {reinterpret_cast<IO *>(s[0]), s[1], s[2]};
}

struct Call {
    int dtype, gate, candidate, num_pre, threads;
    bool reverse;
    std::array<int64_t, 3> shape;
    std::array<Strided, 3> pre;
    Strided h0, reset;
};

template <class IO> Problem<IO> problem(const Call &call) {
    using Real = typename Problem<IO>::Real;
    Problem<IO> p{call.shape[0], call.shape[1], call.shape[2], call.gate,
                  call.candidate, call.num_pre, call.threads, call.reverse,
                  {sequence<const IO>(call.pre[0]), sequence<const IO>(call.pre[1]), sequence<const IO>(call.pre[2])},
                  {reinterpret_cast<const Real *>(call.h0[0]), call.h0[1]},
                  {reinterpret_cast<const uint8_t *>(call.reset[0]), call.reset[1], call.reset[2]}};
    return p;
}

template <class IO> void forward(const Call &call, const Strided &h) {
    const Problem<IO> p = problem<IO>(call);
    run(Forward<IO>(p, *rows, sequence<IO>(h)), p.B, p.T, p.D, p.threads);
}

template <class IO>
void backward(const Call &call, const Strided &dh, const Strided &h, const std::array<Strided, 3> &dpre,
              const Strided &dh0) {
    using Real = typename Problem<IO>::Real;
    const Problem<IO> p = problem<IO>(call);
    const Sequence<IO> outputs[3] = {sequence<IO>(dpre[0]), sequence<IO>(dpre[1]), sequence<IO>(dpre[2])};
    const States<Real> initial{reinterpret_cast<Real *>(dh0[0]), dh0[1]};
    run(Backward<IO>(p, *rows, sequence<const IO>(dh), sequence<const IO>(h), outputs, initial), p.B, p.T, p.D,
        p.threads);
}

template <class X = const float> X *address(Address at) { return reinterpret_cast<X *>(at); }

using Pair = std::array<Address, 2>;  // weight and bias

Affine affine(const Pair &of) { return {address(of[0]), address(of[1])}; }

Projection projection(int64_t in, int64_t out, const Pair &of) { return {in, out, address(of[0]), address(of[1])}; }

using NormOf = std::tuple<int, float, Pair>;

Norm norm(const NormOf &of) {
    return {static_cast<NormKind>(std::get<0>(of)), std::get<1>(of), affine(std::get<2>(of))};
}

Recycler &recycler() {  // never destroyed: tensors may outlive every static object
    static Recycler &instance = *new Recycler;
    return instance;
}

// An object with Python's buffer protocol: a tensor made of it holds it, and gives the memory back when it dies.
struct Block {
    Span span;
    std::size_t bytes;
    explicit Block(std::size_t bytes) : span(recycler().take(bytes)), bytes(bytes) {}
    Block(const Block &) = delete;
    ~Block() { recycler().give(span); }
};

int get_buffer(PyObject *self, Py_buffer *view, int flags) {
    const Block *block = nb::inst_ptr<Block>(self);
    return PyBuffer_FillInfo(view, self, block->span.data, static_cast<Py_ssize_t>(block->bytes), 0, flags);
}

PyType_Slot block_slots[] = {{Py_bf_getbuffer, reinterpret_cast<void *>(get_buffer)}, {0, nullptr}};

// dtypes are numbered as in cpu.py: float32, float64, bfloat16, float16.
template <class F> void for_dtype(int dtype, F &&f) {
    switch (dtype) {
        case 0: return f(float());
        case 1: return f(double());
        case 2: return f(bfloat16());
        case 3: return f(float16());
        default: throw std::invalid_argument("minrnn._cpu: unknown dtype code " + std::to_string(dtype));
    }
}

}  // namespace
}  // namespace minrnn

NB_MODULE(_cpu, m) {
    using namespace minrnn;
    const Isa isa = choose_isa();
    serve(isa);
    m.attr("isa") = kIsaNames[static_cast<int>(isa)];
    nb::set_leak_warnings(false);  // a tensor that lives until the interpreter ends is no leak
    nb::class_<Block>(m, "Block", nb::type_slots(block_slots)).def(nb::init<std::size_t>());
    m.def("release_memory", [] { return recycler().release(); });
    m.def("forward",
          [](int dtype, int gate, int candidate, int num_pre, int threads, bool reverse,
             std::array<int64_t, 3> shape, std::array<Strided, 3> pre, Strided h0, Strided reset, Strided h) {
              const Call call{dtype, gate, candidate, num_pre, threads, reverse, shape, pre, h0, reset};
              nb::gil_scoped_release release;
              for_dtype(dtype, [&](auto io) { forward<decltype(io)>(call, h); });
          });
    m.def("backward",
          [](int dtype, int gate, int candidate, int num_pre, int threads, bool reverse,
             std::array<int64_t, 3> shape, std::array<Strided, 3> pre, Strided h0, Strided reset, Strided dh,
             Strided h, std::array<Strided, 3> dpre, Strided dh0) {
              const Call call{dtype, gate, candidate, num_pre, threads, reverse, shape, pre, h0, reset};
              nb::gil_scoped_release release;
              for_dtype(dtype, [&](auto io) { backward<decltype(io)>(call, dh, h, dpre, dh0); });
          });
    nb::class_<Chain>(m, "Chain")
        .def("__init__", [](Chain *chain, int64_t d_model) { new (chain) Chain{d_model, {}, {}, {}, {}, {}}; })
        .def("start", [](Chain &chain, const std::vector<std::pair<int64_t, Pair>> &parts,
                         const NormOf &of) {
            for (const auto &[in, part] : parts) chain.start.push_back(projection(in, chain.d_model, part));
            chain.start_norm = norm(of);
        })
        // wide: what W_in gives; D: what W_out takes
        .def("branch", [](Chain &chain, const NormOf &of, int64_t conv_width, Pair conv, int64_t wide, int64_t D,
                          Pair up, Pair down, int gate, int candidate, int num_pre, int activation, bool residual) {
            chain.branches.push_back({norm(of), {conv_width, affine(conv)}, projection(chain.d_model, wide, up),
                                      projection(D, chain.d_model, down), gate, candidate, num_pre,
                                      static_cast<Activation>(activation), residual});
        })
        .def("end", [](Chain &chain, const NormOf &of, int64_t out, Pair part) {
            chain.end_norm = norm(of);
            chain.end = projection(chain.d_model, out, part);
        })
        // states: of each branch its window and its h, each before and after the step
        .def("step", [](const Chain &chain, int64_t num_rows, int threads, const std::vector<Address> &inputs,
                        const std::vector<std::array<Address, 4>> &states, Address y) {
            std::vector<const float *> in;
            for (Address x : inputs) in.push_back(address(x));
            std::vector<BranchStates> of;
            for (const auto &s : states)
                of.push_back({address(s[0]), address<float>(s[1]), address(s[2]), address<float>(s[3])});
            nb::gil_scoped_release release;
            run(chain, *rows, *chain_kernels, num_rows, threads, in, of, address<float>(y));
        });
}
