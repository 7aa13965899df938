// SPDX-License-Identifier: Apache-2.0
// The Python module `cudasim`: settings, faults and counts of the simulator, launches of kernels
// that no op wraps.
#include "runtime/control.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>

#include "runtime/checker.h"

namespace py = pybind11;

namespace cudasim {
namespace {

std::vector<std::string> faults_of_last_launch;

Schedule schedule_named(const std::string& name) {
  if (name == "forward") return Schedule::kForward;
  if (name == "reverse") return Schedule::kReverse;
  if (name == "random") return Schedule::kRandom;
  throw std::invalid_argument("schedule: expected forward, reverse or random, got " + name);
}

void configure(const std::string& schedule, uint64_t seed, double preemption, bool strict,
               double watchdog_seconds, size_t max_shared_bytes) {
  if (max_shared_bytes > kMostShared) {
    throw std::invalid_argument("max_shared_bytes: expected at most " +
                                std::to_string(kMostShared) + ", got " +
                                std::to_string(max_shared_bytes));
  }
  options = {schedule_named(schedule), seed, preemption, strict, watchdog_seconds,
             max_shared_bytes};
}

py::dict counts() {
  py::dict result;
  result["launches"] = statistics.launches;
  result["switches"] = statistics.switches;
  result["collectives"] = statistics.collectives;
  result["barriers"] = statistics.barriers;
  result["exits"] = statistics.exits;
  result["accesses"] = statistics.accesses;
  return result;
}

Argument argument_from(const py::object& object) {
  Argument argument{};
  if (py::isinstance<py::buffer>(object)) {
    const py::buffer_info array = py::buffer(object).request();
    argument.data = array.ptr;
    argument.bytes = size_t(array.size * array.itemsize);
  } else if (!object.is_none()) {  // None is the null pointer
    argument.real = object.cast<double>();
    argument.integer = static_cast<long long>(argument.real);
  }
  return argument;
}

// Outputs are uninitialised for the kernel, which has to fill them, unless `updates`.
void launch_test_kernel(const std::string& name, const std::array<unsigned, 3>& grid,
                        const std::array<unsigned, 3>& block, const py::args& objects,
                        size_t shared_bytes, bool updates, bool check) {
  const TestKernel& kernel = test_kernels().at({name, check});
  if (objects.size() != kernel.is_output.size()) {
    throw std::invalid_argument(name + ": expected " + std::to_string(kernel.is_output.size()) +
                                " arguments, got " + std::to_string(objects.size()));
  }
  untrack_all();
  std::vector<Argument> arguments;
  for (size_t i = 0; i < objects.size(); ++i) {
    arguments.push_back(argument_from(objects[i]));
    const bool output = kernel.is_output[i];
    track(arguments[i].data, arguments[i].bytes,
          (output ? "output " : "input ") + std::to_string(i), output, output && !updates);
  }
  kernel.launch({grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared_bytes,
                arguments);
  for (const Argument& argument : arguments) {
    const size_t bytes = argument.bytes ? unwritten_bytes(argument.data) : 0;
    if (bytes) {
      throw std::runtime_error("cudasim: launch of " + name + ": " + std::to_string(bytes) +
                               " bytes of output " + std::to_string(&argument - &arguments[0]) +
                               " were never written");
    }
  }
}

}  // namespace

void record_faults(const std::vector<std::string>& faults) { faults_of_last_launch = faults; }

std::map<std::pair<std::string, bool>, TestKernel>& test_kernels() {
  static std::map<std::pair<std::string, bool>, TestKernel> kernels;
  return kernels;
}

}  // namespace cudasim

PYBIND11_MODULE(cudasim, module) {
  using namespace cudasim;
  module.def("configure", &configure, py::kw_only(), py::arg("schedule"), py::arg("seed"),
             py::arg("preemption"), py::arg("strict"), py::arg("watchdog_seconds"),
             py::arg("max_shared_bytes"));
  module.def("reports", [] { return faults_of_last_launch; });
  module.def("counts", &counts);
  module.def("launch", &launch_test_kernel, py::arg("name"), py::arg("grid"), py::arg("block"),
             py::kw_only(), py::arg("shared_bytes") = 0, py::arg("updates") = false,
             py::arg("check") = true);
}
