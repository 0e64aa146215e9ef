// The Python module moe_kernels._cpu: plain addresses and sizes in, nothing else. Shapes and dtypes
// are checked by the callers in moe_kernels/backends/cpu/.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/kernels.hpp"
#include "memory.hpp"

namespace py = pybind11;

namespace moe {

Blas blas;

namespace {

using Address = uintptr_t;

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

const Kernels& table_of(const std::string& isa) {
#if defined(MOE_HAS_AVX512)
  if (isa == "avx512") return avx512::kernels();
#endif
#if defined(MOE_HAS_AVX2)
  if (isa == "avx2") return avx2::kernels();
#endif
  if (isa == "baseline") return baseline::kernels();
  throw py::value_error("instruction set '" + isa + "' is not in this build");
}

// Instruction sets of this build that this processor has, fastest first.
std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
#if defined(MOE_HAS_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    names.push_back("avx512");
  }
#endif
#if defined(MOE_HAS_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    names.push_back("avx2");
  }
#endif
  names.push_back("baseline");
  return names;
}

const Kernels* kernels = nullptr;
std::string active_isa;

void use_isa(const std::string& isa) {
  for (const std::string& name : usable_isas()) {
    if (name != isa) continue;
    kernels = &table_of(isa);
    active_isa = isa;
    return;
  }
  throw py::value_error("this processor or build lacks the instruction set '" + isa + "'");
}

// A block that a tensor lives in: torch.frombuffer keeps it until the tensor is gone.
class Memory {
 public:
  explicit Memory(int64_t bytes) : bytes_(bytes), data_(take_memory(bytes)) {}
  ~Memory() { give_memory(data_, bytes_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  py::buffer_info buffer() const {
    return {data_, 1, py::format_descriptor<uint8_t>::format(), bytes_};
  }

 private:
  int64_t bytes_;
  void* data_;
};

template <class Args>
void fill_route(Args& args, int dtype, Address logits, Address weights, Address load_balance,
                Address z_loss, Address terms, Address plan, int64_t tokens, int64_t experts,
                int64_t groups, int affinity, bool per_token, double scale, int threads) {
  args.dtype = static_cast<Dtype>(dtype);
  args.logits = at<>(logits);
  args.weights = at<>(weights);
  args.load_balance = at<>(load_balance);
  args.z_loss = at<>(z_loss);
  args.terms = at<>(terms);
  args.plan = at<int32_t>(plan);
  args.tokens = tokens;
  args.experts = experts;
  args.groups = groups;
  args.affinity = static_cast<Affinity>(affinity);
  args.per_token = per_token;
  args.scale = scale;
  args.threads = threads;
}

void fill_mlp(ExpertMlpArgs& args, int dtype, int activation, bool native_bf16,
              const std::vector<bool>& transposed, const std::vector<Address>& in,
              const std::vector<int64_t>& sizes, int threads) {
  args.dtype = static_cast<Dtype>(dtype);
  args.activation = static_cast<Activation>(activation);
  args.native_bf16 = native_bf16;
  args.w_in_transposed = transposed[0];
  args.w_out_transposed = transposed[1];
  args.x = at<>(in[0]);
  args.w_in = at<>(in[1]);
  args.w_out = at<>(in[2]);
  args.bias_in = at<>(in[3]);
  args.bias_out = at<>(in[4]);
  args.weights = at<>(in[5]);
  args.token_indices = at<int32_t>(in[6]);
  args.row_indices = at<int32_t>(in[7]);
  args.row_offsets = at<int32_t>(in[8]);
  args.expert_offsets = at<int32_t>(in[9]);
  args.h = at<>(in[10]);
  args.tokens = sizes[0];
  args.experts = sizes[1];
  args.rows = sizes[2];
  args.hidden = sizes[3];
  args.intermediate = sizes[4];
  args.threads = threads;
}

}  // namespace
}  // namespace moe

PYBIND11_MODULE(_cpu, module) {
  using namespace moe;
  module.doc() = "C++ kernels of moe_kernels for the CPU; see csrc/README.md";
  use_isa(usable_isas().front());

  py::class_<Memory>(module, "Memory", py::buffer_protocol())
      .def(py::init<int64_t>())
      .def_buffer(&Memory::buffer);
  module.def("keep_at_most", &keep_at_most);
  module.def("kept_bytes", &kept_bytes);

  module.def("isas", &usable_isas);
  module.def("isa", [] { return active_isa; });
  module.def("use_isa", &use_isa);
  module.def("gemm_bf16", [] { return reinterpret_cast<Address>(kernels->gemm_bf16()); });
  module.def("set_blas", [](Address f32, Address f64, Address bf16, Address set_threads) {
    blas = {reinterpret_cast<Blas::Gemm>(f32), reinterpret_cast<Blas::Gemm>(f64),
            reinterpret_cast<Blas::Gemm>(bf16), reinterpret_cast<int (*)(int)>(set_threads)};
  });

  module.def("token_choice_fwd",
             [](int dtype, Address logits, Address selection_bias, Address weights,
                Address load_balance, Address z_loss, Address terms, Address plan, int64_t tokens,
                int64_t experts, int64_t groups, int64_t top_k, int64_t expert_groups,
                int64_t top_k_groups, int affinity, bool per_token, double scale, int threads) {
               TokenChoiceArgs args;
               fill_route(args, dtype, logits, weights, load_balance, z_loss, terms, plan, tokens,
                          experts, groups, affinity, per_token, scale, threads);
               args.selection_bias = at<>(selection_bias);
               args.top_k = top_k;
               args.expert_groups = expert_groups;
               args.top_k_groups = top_k_groups;
               py::gil_scoped_release release;
               return kernels->token_choice_fwd(args);
             });

  module.def("expert_choice_fwd",
             [](int dtype, Address logits, Address weights, Address load_balance, Address z_loss,
                Address terms, Address plan, int64_t tokens, int64_t experts, int64_t groups,
                int64_t capacity, int affinity, bool per_token, double scale, int threads) {
               ExpertChoiceArgs args;
               fill_route(args, dtype, logits, weights, load_balance, z_loss, terms, plan, tokens,
                          experts, groups, affinity, per_token, scale, threads);
               args.capacity = capacity;
               py::gil_scoped_release release;
               return kernels->expert_choice_fwd(args);
             });

  module.def(
      "route_bwd",
      [](int dtype, Address logits, Address plan, Address dweights, Address dload_balance,
         Address dz_loss, Address dterms, Address dlogits, int64_t tokens, int64_t experts,
         int64_t groups, int64_t rows, int affinity, bool per_token, double scale, int threads) {
        py::gil_scoped_release release;
        kernels->route_bwd({static_cast<Dtype>(dtype), at<>(logits), at<int32_t>(plan),
                            at<>(dweights), at<>(dload_balance), at<>(dz_loss), at<>(dterms),
                            at<>(dlogits), tokens, experts, groups, rows,
                            static_cast<Affinity>(affinity), per_token, scale, threads});
      });

  module.def("affinity_fwd", [](int dtype, Address logits, Address probs, int64_t tokens,
                                int64_t experts, int affinity, int threads) {
    py::gil_scoped_release release;
    kernels->affinity_fwd({static_cast<Dtype>(dtype), at<>(logits), at<>(probs), tokens, experts,
                           static_cast<Affinity>(affinity), threads});
  });

  const auto similarity = [](int dtype, Address logits, Address row_experts, Address row_offsets,
                             Address pair_weights, Address loss, Address dloss, Address dlogits,
                             int64_t tokens, int64_t experts, int threads) {
    return SimilarityArgs{static_cast<Dtype>(dtype),
                          at<>(logits),
                          at<int32_t>(row_experts),
                          at<int32_t>(row_offsets),
                          at<>(pair_weights),
                          at<>(loss),
                          at<>(dloss),
                          at<>(dlogits),
                          tokens,
                          experts,
                          threads};
  };
  module.def("similarity_fwd", [similarity](int dtype, Address logits, Address row_experts,
                                            Address row_offsets, Address pair_weights, Address loss,
                                            int64_t tokens, int64_t experts, int threads) {
    py::gil_scoped_release release;
    kernels->similarity_fwd(similarity(dtype, logits, row_experts, row_offsets, pair_weights, loss,
                                       0, 0, tokens, experts, threads));
  });
  module.def("similarity_bwd",
             [similarity](int dtype, Address logits, Address pair_weights, Address dloss,
                          Address dlogits, int64_t tokens, int64_t experts, int threads) {
               py::gil_scoped_release release;
               kernels->similarity_bwd(similarity(dtype, logits, 0, 0, pair_weights, 0, dloss,
                                                  dlogits, tokens, experts, threads));
             });

  module.def("indices_within", [](Address indices, int64_t count, int64_t end) {
    const int32_t* values = at<int32_t>(indices);
    int32_t low = 0, high = -1;
    for (int64_t i = 0; i < count; ++i) {
      low = values[i] < low ? values[i] : low;
      high = values[i] > high ? values[i] : high;
    }
    return low >= 0 && high < end;
  });

  module.def("combine",
             [](int dtype, Address rows, Address weights, Address row_indices, Address row_offsets,
                Address out, int64_t tokens, int64_t hidden, int threads) {
               py::gil_scoped_release release;
               kernels->combine({static_cast<Dtype>(dtype), at<>(rows), at<>(weights),
                                 at<int32_t>(row_indices), at<int32_t>(row_offsets), at<>(out),
                                 tokens, hidden, threads});
             });

  module.def("gather",
             [](int dtype, Address dout, Address rows, Address weights, Address token_indices,
                Address drows, Address dweights, int64_t num_rows, int64_t hidden, int threads) {
               py::gil_scoped_release release;
               kernels->gather({static_cast<Dtype>(dtype), at<>(dout), at<>(rows), at<>(weights),
                                at<int32_t>(token_indices), at<>(drows), at<>(dweights), num_rows,
                                hidden, threads});
             });

  const auto activation = [](int dtype, int kind, Address h, Address bias, Address weights,
                             Address expert_offsets, Address a, Address da, Address dh,
                             Address dweights, int64_t num_rows, int64_t experts,
                             int64_t intermediate, int threads) {
    return ActivationArgs{static_cast<Dtype>(dtype),
                          static_cast<Activation>(kind),
                          at<>(h),
                          at<>(bias),
                          at<>(weights),
                          at<int32_t>(expert_offsets),
                          at<>(a),
                          at<>(da),
                          at<>(dh),
                          at<>(dweights),
                          num_rows,
                          experts,
                          intermediate,
                          threads};
  };
  module.def(
      "activation_fwd", [activation](int dtype, int kind, Address h, Address bias, Address weights,
                                     Address expert_offsets, Address a, int64_t num_rows,
                                     int64_t experts, int64_t intermediate, int threads) {
        py::gil_scoped_release release;
        kernels->activation_fwd(activation(dtype, kind, h, bias, weights, expert_offsets, a, 0, 0,
                                           0, num_rows, experts, intermediate, threads));
      });
  module.def(
      "activation_bwd",
      [activation](int dtype, int kind, Address h, Address bias, Address weights,
                   Address expert_offsets, Address a, Address da, Address dh, Address dweights,
                   int64_t num_rows, int64_t experts, int64_t intermediate, int threads) {
        py::gil_scoped_release release;
        kernels->activation_bwd(activation(dtype, kind, h, bias, weights, expert_offsets, a, da, dh,
                                           dweights, num_rows, experts, intermediate, threads));
      });

  // transposed: whether w_in and w_out lie so; in: x, w_in, w_out, bias_in, bias_out, weights,
  // token_indices, row_indices, row_offsets, expert_offsets, h; sizes: tokens, experts, rows,
  // hidden, intermediate.
  module.def("expert_mlp_fwd",
             [](int dtype, int kind, bool native_bf16, const std::vector<bool>& transposed,
                const std::vector<Address>& in, const std::vector<int64_t>& sizes, Address out,
                int threads) {
               ExpertMlpFwdArgs args;
               fill_mlp(args, dtype, kind, native_bf16, transposed, in, sizes, threads);
               args.out = at<>(out);
               py::gil_scoped_release release;
               kernels->expert_mlp_fwd(args);
             });
  // gradients: dout, then dx, dw_in, dw_out, dbias_in, dbias_out, dweights (0 where not wanted).
  module.def("expert_mlp_bwd",
             [](int dtype, int kind, bool native_bf16, const std::vector<bool>& transposed,
                const std::vector<Address>& in, const std::vector<int64_t>& sizes,
                const std::vector<Address>& gradients, int threads) {
               ExpertMlpBwdArgs args;
               fill_mlp(args, dtype, kind, native_bf16, transposed, in, sizes, threads);
               args.dout = at<>(gradients[0]);
               args.dx = at<>(gradients[1]);
               args.dw_in = at<>(gradients[2]);
               args.dw_out = at<>(gradients[3]);
               args.dbias_in = at<>(gradients[4]);
               args.dbias_out = at<>(gradients[5]);
               args.dweights = at<>(gradients[6]);
               py::gil_scoped_release release;
               kernels->expert_mlp_bwd(args);
             });

  module.def("grouped_gemm_fwd", [](int dtype, bool native_bf16, bool w_transposed, Address rows,
                                    Address w, Address expert_offsets, Address out, int64_t experts,
                                    int64_t num_rows, int64_t in_features, int64_t out_features,
                                    int threads) {
    py::gil_scoped_release release;
    kernels->grouped_gemm_fwd({static_cast<Dtype>(dtype), native_bf16, w_transposed, at<>(rows),
                               at<>(w), at<int32_t>(expert_offsets), at<>(out), nullptr, nullptr,
                               nullptr, experts, num_rows, in_features, out_features, threads});
  });
  module.def("grouped_gemm_bwd",
             [](int dtype, bool native_bf16, bool w_transposed, Address rows, Address w,
                Address expert_offsets, Address dout, Address drows, Address dw, int64_t experts,
                int64_t num_rows, int64_t in_features, int64_t out_features, int threads) {
               py::gil_scoped_release release;
               kernels->grouped_gemm_bwd({static_cast<Dtype>(dtype), native_bf16, w_transposed,
                                          at<>(rows), at<>(w), at<int32_t>(expert_offsets), nullptr,
                                          at<>(dout), at<>(drows), at<>(dw), experts, num_rows,
                                          in_features, out_features, threads});
             });
}
