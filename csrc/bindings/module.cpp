// fastlora._C: importing it registers the ops of ops.cpp; build_info() says what was built.
#include <pybind11/pybind11.h>

#include "cpu/kernels.h"

PYBIND11_MODULE(_C, module) {
  module.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["compiler"] = __VERSION__;
        info["cpu_isas"] = fastlora::compiled_isas();
        info["cpu_isa"] = fastlora::kernels().isa;
        info["torch_abi"] = "stable, torch >= 2.10";
        return info;
      },
      "What this library was built with, and the instruction set that it runs. Raises RuntimeError "
      "if "
      "FASTLORA_CPU_ISA asks for one that can't be had.");
}
