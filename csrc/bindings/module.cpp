// fastlora._C: importing it registers the ops of *_ops.cpp. The functions here say how they run.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/runtime/kernels.h"
#include "cpu/runtime/tile_sizes.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["cpu_isas"] = fastlora::compiled_isas();
  info["cpu_isa"] = fastlora::kernels().isa;
  info["torch_abi"] = "stable, torch >= 2.10";
  return info;
}

py::dict as_dict(const fastlora::TileSizes& sizes) {
  py::dict result;
  for (const auto& field : fastlora::kTileSizeFields) result[field.name] = sizes.*field.value;
  return result;
}

void set_tile_sizes(const py::kwargs& given) {
  fastlora::TileSizes sizes = fastlora::tile_sizes();
  for (const auto& [key, value] : given) {
    const auto name = py::cast<std::string>(key);
    bool known = false;
    for (const auto& field : fastlora::kTileSizeFields) {
      if (name != field.name) continue;
      if (!py::isinstance<py::int_>(value) || py::isinstance<py::bool_>(value))
        throw py::type_error(name + " must be an int");
      const int64_t number = PyLong_AsLongLong(value.ptr());
      if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
      sizes.*field.value = number;
      known = true;
    }
    if (!known) throw std::invalid_argument("no tile size has the name " + name);
  }
  fastlora::set_tile_sizes(sizes);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.def("build_info", &build_info,
             "What this library was built with, and the instruction set that it runs. Raises "
             "RuntimeError if FASTLORA_CPU_ISA asks for one that can't be had.");
  module.def(
      "tile_sizes", [] { return as_dict(fastlora::tile_sizes()); },
      "Rows, columns and tokens that the CPU kernels work on at a time: csrc/common/params.h.");
  module.def("set_tile_sizes", &set_tile_sizes,
             "Sets those tile sizes that are given by name, for all later calls of this process. "
             "Raises ValueError for a name or a value that the kernels don't have.");
  module.def(
      "default_tile_sizes",
      [](const std::string& isa, int64_t l2, int64_t l3) {
        return as_dict(fastlora::default_tile_sizes(isa.c_str(), {l2, l3}));
      },
      py::arg("isa"), py::arg("l2"), py::arg("l3"),
      "The table's sizes for an instruction set, fitted to caches of so many bytes; 0: not known. "
      "Raises ValueError for an instruction set that the table lacks.");
}
