// One call of a residual junction: what goes by on the way forward, by the shortcut and through the branch.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/add.h>
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

// The sites of a junction, in the order of JUNCTION_KINDS.
enum Site : int64_t { kX, kF, kY, kIncoming, kShortcut, kBranch, kDot, kSites };

inline constexpr double kNoDtype = std::numeric_limits<double>::quiet_NaN();  // of what is no tensor of the training

// Takes the gradient's parts at x: the shortcut's as the junction hands it out, the branch's as they arrive, of which
// there are `n_arrivals` in a backward.
class JunctionCall final : public Observer {
 public:
  JunctionCall(std::shared_ptr<EventRows> rows, int64_t first) : rows_(std::move(rows)), first_(first) {}

  bool wants_gradient() const override { return rows_->enabled; }

  void on_gradient(const at::Tensor& incoming, const double* incoming_row, const at::Tensor& gradient,
                   const double* gradient_row, bool reaches_x) override {
    put(kIncoming, incoming, incoming_row);
    put(kShortcut, gradient, gradient_row);
    // Whoever takes or lets go of a tensor that Python knows may wait for the GIL: never under the lock.
    at::Tensor shortcut = reaches_x && n_arrivals > 0 ? gradient : at::Tensor();
    std::vector<at::Tensor> arrived;
    const std::lock_guard<std::mutex> lock(mutex_);
    std::swap(shortcut_, shortcut);
    std::swap(arrived_, arrived);
    backward_ = autograd::get_current_graph_task_id();
  }

  // Takes a part of the gradient at x that comes through the branch; undefined where there is none.
  void on_arrival(at::Tensor part) {
    at::Tensor shortcut;
    std::vector<at::Tensor> parts;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      // another thread may run another backward through the same graph
      if (!shortcut_.defined() || backward_ != autograd::get_current_graph_task_id()) return;
      arrived_.push_back(std::move(part));
      if (static_cast<int64_t>(arrived_.size()) < n_arrivals) return;
      // Let go before the engine adds the parts up: what nobody else holds it adds to in place.
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
  at::Tensor shortcut_;              // what the shortcut brought in this backward, until all parts are there
  std::vector<at::Tensor> arrived_;  // parts of the branch
  int backward_ = -1;                // the one in which the shortcut's part came
};

// On a node whose output is a part of the gradient at x.
class ArrivalHook final : public autograd::FunctionPostHook {
 public:
  ArrivalHook(const std::shared_ptr<JunctionCall>& passage, size_t output) : passage_(passage), output_(output) {}

  autograd::variable_list operator()(const autograd::variable_list& outputs,
                                     const autograd::variable_list& /*inputs*/) override {
    if (const std::shared_ptr<JunctionCall> alive = passage_.lock()) alive->on_arrival(outputs[output_]);
    return outputs;
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& /*arguments*/) const override {}

 private:
  std::weak_ptr<JunctionCall> passage_;  // the junction's node owns it; the branch's may outlive that
  size_t output_;
};

// Finds the nodes by which the branch of a junction hands its part of the gradient to x, and hooks them. None where the
// branch does not come from x, or is larger than `kMostNodes`.
inline void follow_branch(const std::shared_ptr<JunctionCall>& passage, const at::Tensor& x, const at::Tensor& y) {
  constexpr size_t kMostNodes = 10'000;
  const autograd::Edge to_x = autograd::impl::gradient_edge(x);
  const auto& target = *to_x.function;
  // A path to the target has a larger topological number all along; on the target's thread it was built later, too,
  // unless it is one that has no date, as that of a leaf.
  const bool is_dated = target.sequence_nr() != std::numeric_limits<uint64_t>::max();
  const auto may_lead_there = [&](const autograd::Node& node) {
    return node.topological_nr() > target.topological_nr() &&
           (!is_dated || node.thread_id() != target.thread_id() || node.sequence_nr() > target.sequence_nr());
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
  look_at(y.grad_fn().get(), 1);  // of the operands x and f
  while (!waiting.empty()) {
    if (seen.size() > kMostNodes) return;
    autograd::Node* node = waiting.back();
    waiting.pop_back();
    for (size_t output = 0; output < node->num_outputs(); ++output) look_at(node, output);
  }
  passage->n_arrivals = static_cast<int64_t>(found.size());
  for (const auto& [node, output] : found) node->add_post_hook(std::make_unique<ArrivalHook>(passage, output));
}

}  // namespace gradprobe
