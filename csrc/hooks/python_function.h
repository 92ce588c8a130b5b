// A Python function that C++ calls and drops from any thread.
#pragma once

#include <pybind11/pybind11.h>

#include <type_traits>
#include <utility>

namespace gradprobe {

class PythonFunction {
 public:
  explicit PythonFunction(pybind11::object function) : function_(std::move(function)) {}
  PythonFunction(const PythonFunction&) = delete;
  PythonFunction& operator=(const PythonFunction&) = delete;
  ~PythonFunction() {
    if (Py_IsInitialized() == 0) {  // a graph outlived the interpreter
      function_.release();
      return;
    }
    const pybind11::gil_scoped_acquire gil;
    function_ = pybind11::object();
  }

  bool is_none() const { return function_.is_none(); }

  template <typename Result = void, typename... Arguments>
  Result operator()(const Arguments&... arguments) const {
    const pybind11::gil_scoped_acquire gil;
    pybind11::object result = function_(arguments...);
    if constexpr (!std::is_void_v<Result>) return result.template cast<Result>();
  }

 private:
  pybind11::object function_;
};

}  // namespace gradprobe
