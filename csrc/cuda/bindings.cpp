// The Python module moe_kernels._cuda, and _cuda_simulated with the same kernels on the host: plain
// addresses and sizes in, nothing else. Shapes and dtypes are checked by the callers in
// moe_kernels/backends/cuda/.
#include <pybind11/pybind11.h>

#include "device.hpp"
#include "kernels.hpp"

#if defined(MOE_SIMULATED)
#include "launch.hpp"
#endif

namespace py = pybind11;

namespace moe::cuda {
namespace {

using Address = uintptr_t;

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

Device device_of(int index, Address stream) { return {index, at<>(stream)}; }

void fill_route(RouteCall& call, Address logits, Address weights, Address load_balance,
                Address z_loss, Address terms, Address packed, Address non_finite,
                Address workspace, Address counter, int64_t tokens, int64_t experts, int64_t groups,
                int affinity, bool per_token, float scale) {
  call.logits = at<float>(logits);
  call.weights = at<float>(weights);
  call.load_balance = at<float>(load_balance);
  call.z_loss = at<float>(z_loss);
  call.terms = at<float>(terms);
  call.packed = at<int32_t>(packed);
  call.non_finite = at<int32_t>(non_finite);
  call.workspace = at<char>(workspace);
  call.counter = at<uint32_t>(counter);
  call.tokens = tokens;
  call.experts = experts;
  call.groups = groups;
  call.affinity = static_cast<Affinity>(affinity);
  call.per_token = per_token;
  call.scale = scale;
}

}  // namespace
}  // namespace moe::cuda

PYBIND11_MODULE(MOE_MODULE, module) {
  using namespace moe;
  using namespace moe::cuda;
  module.doc() = "CUDA kernels of moe_kernels; see csrc/README.md";
  module.attr("MOST_EXPERTS") = kMostExperts;
  module.def("why_no_gpu", &why_no_gpu);
  module.def("is_capturing", [](Address stream) { return is_capturing(at<>(stream)); });
  module.def("new_counters", [](int device, int64_t count) {
    return reinterpret_cast<Address>(new_counters(device, count));
  });

  module.def("expert_choice_workspace", [](int64_t tokens, int64_t experts, int64_t groups,
                                           int team, int device) {
    return expert_choice_workspace(tokens, experts, groups, static_cast<TeamChoice>(team), device);
  });
  module.def("token_choice_workspace", &token_choice_workspace);

  module.def("expert_choice_fwd",
             [](int device, Address stream, Address logits, Address weights, Address load_balance,
                Address z_loss, Address terms, Address packed, Address non_finite,
                Address workspace, Address counter, int64_t tokens, int64_t experts, int64_t groups,
                int64_t capacity, int affinity, bool per_token, float scale, int team) {
               ExpertChoiceCall call;
               fill_route(call, logits, weights, load_balance, z_loss, terms, packed, non_finite,
                          workspace, counter, tokens, experts, groups, affinity, per_token, scale);
               call.capacity = capacity;
               call.team = static_cast<TeamChoice>(team);
               py::gil_scoped_release release;
               expert_choice_fwd(device_of(device, stream), call);
             });

  module.def("token_choice_fwd",
             [](int device, Address stream, Address logits, Address selection_bias, Address weights,
                Address load_balance, Address z_loss, Address terms, Address packed,
                Address non_finite, Address workspace, Address counter, int64_t tokens,
                int64_t experts, int64_t groups, int64_t top_k, int64_t expert_groups,
                int64_t top_k_groups, int affinity, bool per_token, float scale) {
               TokenChoiceCall call;
               fill_route(call, logits, weights, load_balance, z_loss, terms, packed, non_finite,
                          workspace, counter, tokens, experts, groups, affinity, per_token, scale);
               call.selection_bias = at<float>(selection_bias);
               call.top_k = top_k;
               call.expert_groups = expert_groups;
               call.top_k_groups = top_k_groups;
               py::gil_scoped_release release;
               token_choice_fwd(device_of(device, stream), call);
             });

  module.def("route_bwd", [](int device, Address stream, Address logits, Address packed,
                             Address dweights, Address dload_balance, Address dz_loss,
                             Address dterms, Address dlogits, int64_t tokens, int64_t experts,
                             int64_t groups, int64_t rows, int affinity, bool per_token,
                             float scale) {
    py::gil_scoped_release release;
    route_bwd(device_of(device, stream),
              {at<float>(logits), at<int32_t>(packed), at<float>(dweights),
               at<float>(dload_balance), at<float>(dz_loss), at<float>(dterms), at<float>(dlogits),
               tokens, experts, groups, rows, static_cast<Affinity>(affinity), per_token, scale});
  });

  module.def("affinity_fwd", [](int device, Address stream, Address logits, Address probs,
                                int64_t tokens, int64_t experts, int affinity) {
    py::gil_scoped_release release;
    affinity_fwd(device_of(device, stream), {at<float>(logits), at<float>(probs), tokens, experts,
                                             static_cast<Affinity>(affinity)});
  });

  module.def("gather", [](int device, Address stream, int dtype, Address x, Address values,
                          Address weights, Address token_indices, Address rows, Address dweights,
                          int64_t num_rows, int64_t hidden) {
    py::gil_scoped_release release;
    gather(device_of(device, stream),
           {static_cast<Dtype>(dtype), at<>(x), at<>(values), at<float>(weights),
            at<int32_t>(token_indices), at<>(rows), at<float>(dweights), num_rows, hidden});
  });

  module.def("sum_rows", [](int device, Address stream, int dtype, Address rows, Address weights,
                            Address row_indices, Address row_offsets, Address shared,
                            Address residual, Address out, int64_t tokens, int64_t hidden) {
    py::gil_scoped_release release;
    sum_rows(device_of(device, stream),
             {static_cast<Dtype>(dtype), at<>(rows), at<float>(weights), at<int32_t>(row_indices),
              at<int32_t>(row_offsets), at<>(shared), at<>(residual), at<>(out), tokens, hidden});
  });

#if defined(MOE_SIMULATED)
  // The GPU that is simulated, and the order of its threads (0 forward, 1 backward, 2 shuffled).
  module.def(
      "simulate",
      [](int processors, int largest_cluster, int64_t shared_bytes, int blocks_per_processor,
         int order, uint64_t seed) {
        simulated_gpu.processors = processors;
        simulated_gpu.largest_cluster = largest_cluster;
        simulated_gpu.shared_bytes = shared_bytes;
        simulated_gpu.blocks_per_processor = blocks_per_processor;
        simulated_gpu.order = static_cast<Order>(order);
        simulated_gpu.seed = seed;
      },
      py::kw_only(), py::arg("processors") = SimulatedGpu().processors,
      py::arg("largest_cluster") = SimulatedGpu().largest_cluster,
      py::arg("shared_bytes") = SimulatedGpu().shared_bytes,
      py::arg("blocks_per_processor") = SimulatedGpu().blocks_per_processor, py::arg("order") = 0,
      py::arg("seed") = 0);
  module.def("launches", [] { return simulated_gpu.launches; });
#endif
}
