// The Python module minrnn.ops._cpu. Each part has a submodule and a file that binds it.
#include <nanobind/nanobind.h>

#include "isa.h"
#include "memory.h"
#include "tensor.h"
#include "threads.h"

namespace minrnn {

void bind_scan(nb::module_ m, Isa isa);       // scan_bind.cpp
void bind_selective(nb::module_ m, Isa isa);  // selective_bind.cpp
void bind_decode(nb::module_ m, Isa isa);     // decode_bind.cpp

}  // namespace minrnn

NB_MODULE(_cpu, m) {
    using namespace minrnn;
    const Isa isa = choose_isa();
    m.attr("isa") = kIsaNames[static_cast<int>(isa)];
    m.attr("threads_by") = threads_by();
    nb::set_leak_warnings(false);  // a model that lives until the interpreter ends is no leak
    translate_bad_alloc();
    m.def("prefer_huge_pages", &prefer_huge_pages);
    bind_scan(m.def_submodule("scan"), isa);
    bind_selective(m.def_submodule("selective"), isa);
    bind_decode(m.def_submodule("decode"), isa);
}
