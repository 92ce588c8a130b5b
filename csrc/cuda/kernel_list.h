// The list of the library's kernels, so that each can be loaded on a device before the first launch.
#pragma once

namespace gradprobe::cuda {

struct ListedKernel;
inline const ListedKernel* first_kernel = nullptr;

// Adds itself to the list. Instances are static, so the list is complete once the library is loaded.
struct ListedKernel {
  ListedKernel(const void* its_function, const char* its_description)
      : function(its_function), description(its_description), next(first_kernel) {
    first_kernel = this;
  }

  const void* function;
  const char* description;  // ends with "kernel = <name and template arguments>]"
  const ListedKernel* next;
};

template <auto kernel>
const char* describe() {
  return __PRETTY_FUNCTION__;
}

template <auto kernel>
inline const ListedKernel listed{reinterpret_cast<const void*>(kernel), describe<kernel>()};

}  // namespace gradprobe::cuda
