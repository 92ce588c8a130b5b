// The Python module gradprobe._hooks.
#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <cstddef>
#include <memory>
#include <vector>

#include "hooks/batch_norm.h"
#include "hooks/convolution.h"
#include "hooks/event_rows.h"
#include "hooks/gradient_hooks.h"
#include "hooks/gradients.h"
#include "hooks/junction_hooks.h"
#include "hooks/output_hooks.h"

PYBIND11_MODULE(_hooks, module) {
  using gradprobe::EventRows;
  using gradprobe::GradientHooks;
  py::class_<EventRows, std::shared_ptr<EventRows>>(module, "EventRows")
      .def(py::init<size_t, size_t, bool>(), py::arg("most"), py::arg("n_sites"), py::arg("strict"))
      .def_property(
          "enabled", [](const EventRows& rows) { return rows.enabled.load(); },
          [](EventRows& rows, bool enabled) { rows.enabled = enabled; })
      .def_property_readonly("is_full", &EventRows::is_full)
      .def_property_readonly("n_events", &EventRows::n_events)
      .def("next", &EventRows::next_row, py::arg("site"), py::arg("numel"), py::arg("smallest_normal"))
      .def("known", &EventRows::known_row, py::arg("tensor"))
      .def(
          "remember",
          [](EventRows& rows, const at::Tensor& tensor, const at::Tensor& row) {
            rows.remember(tensor, row.const_data_ptr<double>());
          },
          py::arg("tensor"), py::arg("row"))
      .def("events", &EventRows::events)
      .def("clear", &EventRows::clear)
      .def("is_off", &EventRows::is_off, py::arg("site"))
      .def("switch_off", &EventRows::switch_off, py::arg("site"), py::arg("n_sites"))
      .def("off_sites", &EventRows::off_sites)
      .def("take_errors", &EventRows::take_errors);
  gradprobe::define_output_hooks(module);
  gradprobe::define_junction_hooks(module);
  gradprobe::define_batch_norm(module);
  gradprobe::define_convolution(module);
  module.def("grad_stats_into", &gradprobe::grad_stats_into, py::arg("tensors"), py::arg("out"));
  module.def("free_removed_hooks", &gradprobe::free_removed_hooks);
  py::class_<GradientHooks>(module, "GradientHooks")
      .def(py::init<const std::vector<at::Tensor>&, const std::vector<at::Tensor>&, py::object, py::object>(),
           py::arg("parameters"), py::arg("frozen"), py::arg("on_backward_end"), py::arg("on_gradient"))
      .def("remove", &GradientHooks::remove)
      .def("start_step", &GradientHooks::start_step)
      .def("has_fired", &GradientHooks::has_fired)
      .def("n_fired", &GradientHooks::n_fired)
      .def("fired", &GradientHooks::fired)
      .def("mark", &GradientHooks::mark)
      .def("n_writes", &GradientHooks::n_writes)
      .def("is_current", &GradientHooks::is_current)
      .def("accumulates", &GradientHooks::accumulates)
      .def("is_outdated", &GradientHooks::is_outdated)
      .def("take_error", &GradientHooks::take_error)
      .def("measure", &gradprobe::measure, py::arg("rows"))
      .def("gradients", &gradprobe::list_gradients)
      .def("parameters", &gradprobe::list_parameters);
}
