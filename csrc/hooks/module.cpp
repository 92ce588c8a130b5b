// The Python module gradprobe._hooks.
#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <cstddef>
#include <memory>
#include <vector>

#include "hooks/batch_norm.h"
#include "hooks/convolution.h"
#include "hooks/device_event_rows.h"
#include "hooks/event_log.h"
#include "hooks/event_rows.h"
#include "hooks/gradient_hooks.h"
#include "hooks/gradients.h"
#include "hooks/junction_hooks.h"
#include "hooks/output_hooks.h"

PYBIND11_MODULE(_hooks, module) {
  using gradprobe::DeviceEventRows;
  using gradprobe::EventLog;
  using gradprobe::EventRows;
  using gradprobe::GradientHooks;
  py::class_<EventLog, std::shared_ptr<EventLog>>(module, "EventLog")
      .def_property(
          "enabled", [](const EventLog& log) { return log.enabled.load(); },
          [](EventLog& log, bool enabled) { log.enabled = enabled; })
      .def_property_readonly("is_full", &EventLog::is_full)
      .def_property_readonly("n_events", &EventLog::n_events)
      .def("is_off", &EventLog::is_off, py::arg("site"))
      .def("switch_off", &EventLog::switch_off, py::arg("site"), py::arg("n_sites"))
      .def("off_sites", &EventLog::off_sites)
      .def("take_errors", &EventLog::take_errors);
  py::class_<EventRows, EventLog, std::shared_ptr<EventRows>>(module, "EventRows")
      .def(py::init<size_t, size_t, bool>(), py::arg("most"), py::arg("n_sites"), py::arg("strict"))
      .def("next", &EventRows::next_row, py::arg("site"), py::arg("numel"), py::arg("smallest_normal"))
      .def("known", &EventRows::known_row, py::arg("tensor"))
      .def(
          "remember",
          [](EventRows& rows, const at::Tensor& tensor, const at::Tensor& row) {
            rows.remember(tensor, row.const_data_ptr<double>());
          },
          py::arg("tensor"), py::arg("row"))
      .def("events", &EventRows::events)
      .def("clear", &EventRows::clear);
  py::class_<DeviceEventRows, EventLog, std::shared_ptr<DeviceEventRows>>(module, "DeviceEventRows")
      .def(py::init<size_t, size_t, bool, at::Device, py::object>(), py::arg("most"), py::arg("n_sites"),
           py::arg("strict"), py::arg("device"), py::arg("is_capturing"))
      .def("next", &DeviceEventRows::next, py::arg("site"), py::arg("numel"), py::arg("smallest_normal"))
      .def("known", &DeviceEventRows::known, py::arg("tensor"))
      .def("remember", &DeviceEventRows::remember, py::arg("tensor"), py::arg("row"))
      .def("events", &DeviceEventRows::events)
      .def("clear", &DeviceEventRows::clear);
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
