// One call of an observed residual add: measures its tensors, and both parts of the gradient at x.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/add.h>
#include <c10/util/FunctionRef.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <unordered_set>
#include <utility>
#include <vector>

#include "cpu/residual_pass.h"
#include "hooks/event_rows.h"
#include "hooks/plain_tensor.h"
#include "hooks/residual_node.h"

namespace gradprobe {

// The sites of a residual add, in the order of JUNCTION_KINDS.
enum Site : int64_t { kX, kF, kY, kIncoming, kShortcut, kBranch, kDot, kSites };

// The smallest normal number of a row that belongs to no tensor of the training.
inline constexpr double kNoDtype = std::numeric_limits<double>::quiet_NaN();

// The shortcut's part of the gradient is the one that the residual add hands out. The branch's part is the sum of
// `n_arrivals` gradients, one per edge from the branch into x.
class JunctionCall final : public Observer {
 public:
  JunctionCall(std::shared_ptr<EventRows> rows, int64_t first) : rows_(std::move(rows)), first_(first) {}

  void fence(c10::function_ref<void()> measure) override { rows_->fence(first_, kSites, measure); }

  bool wants_gradient() const override { return rows_->enabled && !rows_->is_off(first_); }

  void on_gradient(const at::Tensor& incoming, const double* incoming_row, const at::Tensor& gradient,
                   const double* gradient_row, bool reaches_x) override {
    put(kIncoming, incoming, incoming_row);
    put(kShortcut, gradient, gradient_row);
    // Taking or releasing a tensor that Python knows may wait for the GIL, so it never happens under the lock.
    at::Tensor shortcut = reaches_x && n_arrivals > 0 ? gradient : at::Tensor();
    std::vector<at::Tensor> arrived;
    const std::lock_guard<std::mutex> lock(mutex_);
    std::swap(shortcut_, shortcut);
    std::swap(arrived_, arrived);
    backward_ = autograd::get_current_graph_task_id();
  }

  // Takes one gradient of the branch; undefined if the backward pass computes none.
  void on_arrival(at::Tensor part) {
    at::Tensor shortcut;
    std::vector<at::Tensor> parts;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      // Another thread may run another backward pass through the same graph.
      if (!shortcut_.defined() || backward_ != autograd::get_current_graph_task_id()) return;
      arrived_.push_back(std::move(part));
      if (static_cast<int64_t>(arrived_.size()) < n_arrivals) return;
      // Release the parts before the engine adds them up: it works in place on tensors that nobody else holds.
      shortcut = std::exchange(shortcut_, at::Tensor());
      parts = std::exchange(arrived_, {});
    }
    parts.erase(std::remove_if(parts.begin(), parts.end(), [](const at::Tensor& one) { return !one.defined(); }),
                parts.end());
    if (!parts.empty() && rows_->enabled) take_branch(sum_of(parts), shortcut);
  }

  void put(Site site, const at::Tensor& tensor, const double* row) {
    double* kept = rows_->next(first_ + site, tensor);
    std::copy_n(row, kStats, kept);
    rows_->remember(tensor, kept);
  }

  int64_t n_arrivals = 0;

 private:
  static at::Tensor sum_of(const std::vector<at::Tensor>& parts) {
    const at::AutoDispatchBelowADInplaceOrView below;
    at::Tensor sum = parts.front();
    for (size_t k = 1; k < parts.size(); ++k) sum = at::add(sum, parts[k]);
    return sum;
  }

  void take_branch(const at::Tensor& branch, const at::Tensor& shortcut) {
    if (!is_plain(branch) || !is_plain(shortcut) || branch.sizes() != shortcut.sizes()) return;
    const at::AutoDispatchBelowADInplaceOrView below;
    const at::Tensor beside =
        shortcut.scalar_type() == branch.scalar_type() ? shortcut : shortcut.to(branch.scalar_type());
    double rows[2][kStats];
    if (is_simple_pair(branch, beside) && branch.strides() == beside.strides()) {
      cpu::branch(*dtype_of(branch), branch.const_data_ptr(), beside.const_data_ptr(), branch.numel(), rows[0],
                  rows[1]);
    } else {
      static const auto branch_stats = c10::Dispatcher::singleton()
                                           .findSchemaOrThrow("gradprobe::residual_branch_stats", "")
                                           .typed<at::Tensor(const at::Tensor&, const at::Tensor&)>();
      const at::Tensor both = branch_stats.call(branch, beside);  // [2, 6]
      std::copy_n(both.const_data_ptr<double>(), 2 * kStats, rows[0]);
    }
    std::copy_n(rows[0], kStats, rows_->next(first_ + kBranch, branch.numel(), kNoDtype));
    std::copy_n(rows[1], kStats, rows_->next(first_ + kDot, branch.numel(), kNoDtype));
  }

  std::shared_ptr<EventRows> rows_;
  int64_t first_;
  std::mutex mutex_;
  at::Tensor shortcut_;              // the shortcut's part in this backward pass, until the branch's is complete
  std::vector<at::Tensor> arrived_;  // gradients of the branch so far
  int backward_ = -1;                // the graph task that the shortcut's part came from
};

// A hook on a node of the branch, one of whose outputs is a gradient of x.
class ArrivalHook final : public autograd::FunctionPostHook {
 public:
  ArrivalHook(const std::shared_ptr<JunctionCall>& call, size_t output) : call_(call), output_(output) {}

  autograd::variable_list operator()(const autograd::variable_list& outputs,
                                     const autograd::variable_list& /*inputs*/) override {
    if (const std::shared_ptr<JunctionCall> alive = call_.lock()) {
      alive->fence([&] { alive->on_arrival(outputs.at(output_)); });
    }
    return outputs;
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& /*arguments*/) const override {}

 private:
  std::weak_ptr<JunctionCall> call_;  // owned by the residual add's node, which this hook's node may outlive
  size_t output_;
};

// Hooks every node through which the branch passes a gradient to x. Hooks none if the branch does not come from x or
// has more than `kMostNodes` nodes.
inline void follow_branch(const std::shared_ptr<JunctionCall>& call, const at::Tensor& x, const at::Tensor& y) {
  constexpr size_t kMostNodes = 10'000;
  const autograd::Edge to_x = autograd::impl::gradient_edge(x);
  const auto& target = *to_x.function;
  // Every node on a path to the target has a larger topological number. If built on the target's thread, it also has a
  // larger sequence number, unless the target has none, like a leaf's accumulator.
  const bool has_sequence = target.sequence_nr() != std::numeric_limits<uint64_t>::max();
  const auto may_lead_there = [&](const autograd::Node& node) {
    return node.topological_nr() > target.topological_nr() &&
           (!has_sequence || node.thread_id() != target.thread_id() || node.sequence_nr() > target.sequence_nr());
  };
  std::vector<std::pair<autograd::Node*, size_t>> found;
  std::unordered_set<autograd::Node*> seen;
  std::vector<autograd::Node*> waiting;
  const auto look_at = [&](autograd::Node* node, size_t output) {
    const autograd::Edge& edge = node->next_edge(output);
    if (!edge.is_valid()) return;
    if (edge == to_x) {
      found.emplace_back(node, output);
    } else if (may_lead_there(*edge.function) && seen.insert(edge.function.get()).second) {
      waiting.push_back(edge.function.get());
    }
  };
  look_at(y.grad_fn().get(), 1);  // output 0 leads to x, 1 to f
  while (!waiting.empty()) {
    if (seen.size() > kMostNodes) return;
    autograd::Node* node = waiting.back();
    waiting.pop_back();
    for (size_t output = 0; output < node->num_outputs(); ++output) look_at(node, output);
  }
  call->n_arrivals = static_cast<int64_t>(found.size());
  for (const auto& [node, output] : found) node->add_post_hook(std::make_unique<ArrivalHook>(call, output));
}

}  // namespace gradprobe
