// SPDX-License-Identifier: Apache-2.0
// Host side of the CUDA linear_sum_assignment: checks, allocation, launch.
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <tuple>
#include <vector>

#include "common/device.h"
#include "common/dispatch.h"
#include "common/library.h"
#include "matcher/assignment_checks.h"
#include "matcher/assignment_kernels.h"

namespace detr_fast {
namespace {

std::tuple<Tensor, Tensor> linear_sum_assignment_cuda(const Tensor& cost,
                                                      std::optional<Tensor> count,
                                                      int64_t algorithm, bool scipy_ties,
                                                      int64_t non_finite,
                                                      std::vector<double> replacement) {
  using torch::headeronly::ScalarType;
  const AssignmentProblems problems =
      check_assignment(cost, count, algorithm, scipy_ties, non_finite, replacement);
  const int queries = problems.queries, targets = problems.targets;
  constexpr int64_t most = std::numeric_limits<int>::max();
  STD_TORCH_CHECK(int64_t(queries) * targets <= most, "cost: expected at most ", most,
                  " costs in a problem, got ", queries, " x ", targets);
  const DeviceScope device(cost);
  const Tensor query_of_target =
      torch::stable::new_empty(cost, {problems.problems, targets}, ScalarType::Long);
  const Tensor status = torch::stable::new_empty(cost, {problems.problems}, ScalarType::Int);
  if (problems.problems == 0) return {query_of_target, status};
  dispatch_floating(cost, [&](auto zero) {
    using scalar_t = decltype(zero);
    const AssignmentMemory memory = assignment_memory<scalar_t>(problems.ties, queries, targets);
    const Tensor workspace = torch::stable::new_empty(
        cost, {problems.problems, int64_t(memory.workspace_bytes)}, ScalarType::Byte);
    const AssignmentCall<scalar_t> call = {cost_view(cost, device.read<scalar_t>(cost)),
                                           count ? device.read<int>(*count) : nullptr,
                                           count ? count->stride(0) : 0,
                                           problems.problems,
                                           queries,
                                           targets,
                                           problems.non_finite,
                                           memory,
                                           device.scratch<unsigned char>(workspace),
                                           device.write<int64_t>(query_of_target),
                                           device.write<int>(status)};
    launch_linear_sum_assignment(call, problems.algorithm, problems.ties, device.stream());
    device.check_launch();
  });
  return {query_of_target, status};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DETR_FAST_NAMESPACE, DETR_FAST_CUDA_KEY, m) {
  m.impl("linear_sum_assignment", TORCH_BOX(&linear_sum_assignment_cuda));
}

}  // namespace detr_fast
