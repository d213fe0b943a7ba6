// The Python module minrnn.ops._cpu: raw pointers in, nothing out. The only file here that knows Python.
//
// Nothing is checked: src/minrnn/ops/cpu.py is the only caller and passes what scan.py has checked.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>

#include <array>
#include <cstddef>
#include <stdexcept>
#include <string>

#include "memory.h"
#include "scan.h"

namespace nb = nanobind;

namespace minrnn {
namespace {

const RowTable *rows;  // of the instruction set that was chosen when the module was loaded

const RowTable &rows_of(Isa isa) {
    switch (isa) {
#ifdef MINRNN_X86
        case Isa::avx512_bf16: return avx512_bf16::rows;
        case Isa::avx512: return avx512::rows;
        case Isa::avx2: return avx2::rows;
#endif
        default: return baseline::rows;
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
    rows = &rows_of(isa);
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
}
