// The functions of this instruction set, in the order of the pipeline.
#include "kernels.hpp"

namespace moe {
namespace MOE_ISA {

bool token_choice_fwd(const TokenChoiceArgs&);
bool expert_choice_fwd(const ExpertChoiceArgs&);
void route_bwd(const RouteBwdArgs&);
void affinity_fwd(const AffinityArgs&);
void similarity_fwd(const SimilarityArgs&);
void similarity_bwd(const SimilarityArgs&);
void combine(const CombineArgs&);
void gather(const GatherArgs&);
void activation_fwd(const ActivationArgs&);
void activation_bwd(const ActivationArgs&);
void expert_mlp_fwd(const ExpertMlpFwdArgs&);
void expert_mlp_bwd(const ExpertMlpBwdArgs&);
void grouped_gemm_fwd(const GroupedGemmArgs&);
void grouped_gemm_bwd(const GroupedGemmArgs&);
Blas::Gemm gemm_bf16();

const Kernels& kernels() {
  static constexpr Kernels table = {
      token_choice_fwd, expert_choice_fwd, route_bwd,        affinity_fwd,     similarity_fwd,
      similarity_bwd,   combine,           gather,           activation_fwd,   activation_bwd,
      expert_mlp_fwd,   expert_mlp_bwd,    grouped_gemm_fwd, grouped_gemm_bwd, gemm_bf16,
  };
  return table;
}

}  // namespace MOE_ISA
}  // namespace moe
