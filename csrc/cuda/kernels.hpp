// What the kernels take: raw contiguous buffers on the GPU and sizes; every pointer may be null
// where a comment says so. T tokens, E experts, K top_k, G groups, S = T / G, C capacity, R rows,
// D hidden size. Routing is in fp32, indices are int32; T, R and G·E are below 2^31.
//
// Each function puts one kernel (where it says so, several) into the stream and returns.
#pragma once

#include <cstdint>

#include "../routing.hpp"

namespace moe::cuda {

// Where a kernel runs: the GPU and the stream, as PyTorch numbers and hands them over.
struct Device {
  int index;
  void* stream;
};

// More experts do not fit the registers of a warp.
constexpr int64_t kMostExperts = 256;

// Which blocks share a group of expert choice: a cluster, the grid, or the grid also inside a pool,
// as for pools that no block can hold. `automatic` leaves it to the launcher; tests ask for each.
enum class TeamChoice : int { automatic = 0, cluster = 1, grid = 2, chunks = 3 };

struct RouteCall {
  const float* logits;  // (T, E)
  float* weights;       // (R,)
  float* load_balance;  // scalar
  float* z_loss;        // scalar
  float* terms;         // (2 + E,), see Term
  int32_t* packed;      // PlanLayout
  int32_t* non_finite;  // scalar: 1 when a logit is NaN or infinite, else 0
  char* workspace;      // bytes of the function beside, aligned to 16; contents do not matter
  uint32_t* counter;    // scalar, 0 before and after
  int64_t tokens, experts, groups;
  Affinity affinity;
  bool per_token;
  float scale;
};

struct ExpertChoiceCall : RouteCall {
  int64_t capacity;
  TeamChoice team;
};
int64_t expert_choice_workspace(int64_t tokens, int64_t experts, int64_t groups, TeamChoice team,
                                int device);
void expert_choice_fwd(const Device& device, const ExpertChoiceCall& call);

struct TokenChoiceCall : RouteCall {
  const float* selection_bias;  // (E,) or null
  int64_t top_k, expert_groups, top_k_groups;
};
int64_t token_choice_workspace(int64_t tokens, int64_t experts, int64_t groups, int64_t top_k,
                               int device);
void token_choice_fwd(const Device& device, const TokenChoiceCall& call);

struct RouteBwdCall {
  const float* logits;         // (T, E)
  const int32_t* packed;       // PlanLayout
  const float* dweights;       // (R,) or null, as the next three
  const float* dload_balance;  // scalar
  const float* dz_loss;        // scalar
  const float* dterms;         // (2 + E,); that of the entropy is not read
  float* dlogits;              // (T, E)
  int64_t tokens, experts, groups, rows;
  Affinity affinity;
  bool per_token;
  float scale;
};
void route_bwd(const Device& device, const RouteBwdCall& call);

struct AffinityCall {
  const float* logits;  // (T, E)
  float* probs;         // (T, E)
  int64_t tokens, experts;
  Affinity affinity;
};
void affinity_fwd(const Device& device, const AffinityCall& call);

// rows[r] = weights[r] · x[token_indices[r]], dweights[r] = <x[token_indices[r]], values[r]>.
struct GatherCall {
  Dtype dtype;                   // of x, values and rows: f32, bf16 or f16
  const void* x;                 // (T, D)
  const void* values;            // (R, D) or null
  const float* weights;          // (R,) or null
  const int32_t* token_indices;  // (R,)
  void* rows;                    // (R, D)
  float* dweights;               // (R,), null where values is
  int64_t num_rows, hidden;
};
void gather(const Device& device, const GatherCall& call);

// out[t] = sum of weights[r] · rows[r] over the rows r of t, in fp32, + shared[t] + residual[t].
struct SumRowsCall {
  Dtype dtype;                 // of rows, shared, residual and out
  const void* rows;            // (R, D)
  const float* weights;        // (R,) or null
  const int32_t* row_indices;  // (R,)
  const int32_t* row_offsets;  // (T + 1,)
  const void* shared;          // (T, D) or null
  const void* residual;        // (T, D) or null
  void* out;                   // (T, D)
  int64_t tokens, hidden;
};
void sum_rows(const Device& device, const SumRowsCall& call);

}  // namespace moe::cuda
