// Lets compiled autograd trace a node of ours.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace gradprobe {

// Puts a call of `apply` into the graph that compiled autograd traces; what it returns are the node's gradients.
// arguments: the tensors that the node has saved, between `before` and `after` of each.
inline torch::autograd::variable_list call_compiled(torch::dynamo::autograd::SwapSavedVariables& saved,
                                                    const torch::autograd::Node& node,
                                                    torch::dynamo::autograd::functional_apply_t apply,
                                                    const torch::autograd::variable_list& gradients,
                                                    const std::vector<c10::IValue>& arguments) {
  namespace compiled = torch::dynamo::autograd;
  const auto& compiler = compiled::getPyCompilerInterface();
  const std::string function =
      compiler->bind_function(saved.get_py_compiler(), node.name(), std::move(apply),
                              std::vector<at::TypePtr>(arguments.size(), at::TensorType::get()),
                              /*is_custom_function=*/true, /*is_traceable=*/true);
  const auto metadata = compiled::IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
      compiled::get_input_metadata(node.next_edges()));
  return compiler->call_function(saved.get_py_compiler(), "apply_functional", function, gradients, arguments, metadata);
}

}  // namespace gradprobe
