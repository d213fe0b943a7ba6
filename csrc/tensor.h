// torch's tensors, read through Python, so that building does not need torch. This is the one place where an address is
// taken from a tensor, and it checks that all that will be read or written lies within the tensor's storage: a storage may
// have been freed or shortened (untyped_storage().resize_), and some tensors have none.
#pragma once

#include <nanobind/nanobind.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "arrays.h"

namespace minrnn {

namespace nb = nanobind;

template <std::size_t n> using Sizes = std::array<int64_t, n>;

// The result of a method without arguments.
inline nb::object ask(nb::handle x, PyObject *method) {
    PyObject *self = x.ptr(), *result = PyObject_VectorcallMethod(method, &self, 1, nullptr);
    if (!result) throw nb::python_error();
    return nb::steal(result);
}

inline int64_t number(nb::handle x) {
    const long long value = PyLong_AsLongLong(x.ptr());
    if (value == -1 && PyErr_Occurred()) throw nb::python_error();
    return value;
}

struct Methods {
    PyObject *untyped_storage = name("untyped_storage"), *storage_offset = name("storage_offset"),
             *stride = name("stride"), *data_ptr = name("data_ptr"), *nbytes = name("nbytes");
    static PyObject *name(const char *s) { return PyUnicode_InternFromString(s); }
    static const Methods &get() {
        static const Methods methods;
        return methods;
    }
};

// The address of x's first element, from which `extent` elements will be accessed; null where x is None.
template <class X> X *reach(const char *what, nb::handle x, int64_t extent) {
    if (x.is_none()) return nullptr;
    const Methods &methods = Methods::get();
    const nb::object storage = ask(x, methods.untyped_storage);
    const int64_t size = sizeof(X), offset = number(ask(x, methods.storage_offset)),
                  nbytes = number(ask(storage, methods.nbytes)), needed = (offset + extent) * size;
    void *data = PyLong_AsVoidPtr(ask(storage, methods.data_ptr).ptr());
    if (!data && PyErr_Occurred()) throw nb::python_error();
    if (extent > 0 && (!data || needed > nbytes))
        throw std::runtime_error(std::string("minrnn: ") + what + " at storage offset " + std::to_string(offset) +
                                 " with itemsize " + std::to_string(size) + " requires a storage of " +
                                 std::to_string(needed) + " bytes, its data has " + std::to_string(data ? nbytes : 0) +
                                 ": was it freed or resized?");
    return static_cast<X *>(data) + offset;
}

// The same for a tensor that was allocated for this call, whose storage needs no check.
template <class X> X *made(nb::handle x) {
    if (x.is_none()) return nullptr;
    void *data = PyLong_AsVoidPtr(ask(x, Methods::get().data_ptr).ptr());
    if (!data && PyErr_Occurred()) throw nb::python_error();
    return static_cast<X *>(data);
}

// A tensor of the given sizes; strides count elements.
template <class X, std::size_t n> struct View {
    X *data = nullptr;
    Sizes<n> strides{};
};

template <class X, std::size_t n> View<X, n> view(const char *what, nb::handle x, const Sizes<n> &sizes) {
    View<X, n> found;
    if (x.is_none()) return found;
    const nb::object strides = ask(x, Methods::get().stride);
    if (!PyTuple_Check(strides.ptr()) || PyTuple_Size(strides.ptr()) != Py_ssize_t(n))
        throw std::runtime_error(std::string("minrnn: ") + what + " must have " + std::to_string(n) + " axes");
    int64_t extent = 1;
    for (std::size_t i = 0; i < n; ++i) {
        found.strides[i] = number(PyTuple_GetItem(strides.ptr(), i));
        extent = sizes[i] == 0 ? -1 : extent + (sizes[i] - 1) * found.strides[i];
        if (extent < 0) return found;  // no elements, no address
    }
    found.data = reach<X>(what, x, extent);
    return found;
}

template <class X> Sequence<X> sequence(const char *what, nb::handle x, const Sizes<3> &sizes) {
    const View<X, 3> v = view<X>(what, x, sizes);
    return {v.data, v.strides[0], v.strides[1]};
}

inline Resets resets(nb::handle x, int64_t batch, int64_t T) {
    const View<const uint8_t, 2> v = view<const uint8_t>("reset", x, Sizes<2>{batch, T});
    return {v.data, v.strides[0], v.strides[1]};
}

// An allocation of the engine's own that fails raises RuntimeError, as torch's allocations do.
inline void translate_bad_alloc() {
    nb::register_exception_translator([](const std::exception_ptr &thrown, void *) {
        try {
            std::rethrow_exception(thrown);
        } catch (const std::bad_alloc &) {
            PyErr_SetString(PyExc_RuntimeError, "minrnn: can't allocate the engine's workspace");
        }
    });
}

}  // namespace minrnn
