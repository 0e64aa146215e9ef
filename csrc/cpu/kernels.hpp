// What the kernels take: raw contiguous buffers and sizes. One table of functions per instruction
// set; bindings.cpp picks one at import. T tokens, E experts, K top_k, G groups, R rows, D hidden
// size, F intermediate size, C capacity.
#pragma once

#include <cstdint>

#include "../routing.hpp"

namespace moe {

// The matrix products are done by the BLAS that PyTorch already loaded; Python hands over the
// addresses (moe_kernels/backends/cpu/products.py). The only product of our own is gemm_bf16.cpp's.
// Fortran calling convention with 32-bit integers, column-major.
struct Blas {
  using Gemm = void (*)(const char* trans_a, const char* trans_b, const int* m, const int* n,
                        const int* k, const void* alpha, const void* a, const int* lda,
                        const void* b, const int* ldb, const void* beta, void* c, const int* ldc);
  Gemm f32 = nullptr, f64 = nullptr;
  Gemm bf16 = nullptr;  // bf16 operands, fp32 result
  // Sets how many threads a product of the calling thread may use; returns the old number.
  int (*set_threads)(int) = nullptr;
};
extern Blas blas;

enum class Activation : int { gelu_tanh = 0, gelu = 1, swiglu = 2 };

struct RouteArgs {
  Dtype dtype;         // f32 or f64
  const void* logits;  // (T, E)
  void* weights;       // (R,)
  void* load_balance;  // scalar
  void* z_loss;        // scalar
  void* terms;         // (2 + E,), see Term
  int32_t* plan;       // PlanLayout
  int64_t tokens, experts, groups;
  Affinity affinity;
  bool per_token;  // weights divided by their sum over the experts that hold the token
  double scale;
  int threads;
};

struct TokenChoiceArgs : RouteArgs {
  const void* selection_bias;  // (E,) in `dtype`, or null
  int64_t top_k, expert_groups, top_k_groups;
};

struct ExpertChoiceArgs : RouteArgs {
  int64_t capacity;
};

struct RouteBwdArgs {
  Dtype dtype;
  const void* logits;         // (T, E)
  const int32_t* plan;        // PlanLayout
  const void* dweights;       // (R,) or null, as the next three
  const void* dload_balance;  // scalar
  const void* dz_loss;        // scalar
  const void* dterms;         // (2 + E,); that of the entropy is not read
  void* dlogits;              // (T, E)
  int64_t tokens, experts, groups, rows;
  Affinity affinity;
  bool per_token;
  double scale;
  int threads;
};

struct SimilarityArgs {
  Dtype dtype;
  const void* logits;          // (T, E)
  const int32_t* row_experts;  // (R,) expert of each entry of the token -> rows list
  const int32_t* row_offsets;  // (T + 1,)
  void* pair_weights;          // (E, E): written by the forward, read by the backward
  void* loss;                  // scalar, written by the forward
  const void* dloss;           // scalar, read by the backward
  void* dlogits;               // (T, E), written by the backward
  int64_t tokens, experts;
  int threads;
};

struct AffinityArgs {
  Dtype dtype;
  const void* logits;  // (T, E)
  void* probs;         // (T, E)
  int64_t tokens, experts;
  Affinity affinity;
  int threads;
};

// out[t] = sum of weights[r] * rows[r] over the rows r of t; weights may be null (all 1).
struct CombineArgs {
  Dtype dtype;                 // of rows and out
  const void* rows;            // (R, D)
  const void* weights;         // (R,) or null: f64 for f64 rows, else f32
  const int32_t* row_indices;  // (R,)
  const int32_t* row_offsets;  // (T + 1,)
  void* out;                   // (T, D)
  int64_t tokens, hidden;
  int threads;
};

// drows[r] = weights[r] * dout[token of r]; dweights[r] = <dout[token of r], rows[r]>.
// With rows and dweights null it is a plain gather.
struct GatherArgs {
  Dtype dtype;
  const void* dout;              // (T, D)
  const void* rows;              // (R, D) or null
  const void* weights;           // (R,) or null
  const int32_t* token_indices;  // (R,)
  void* drows;                   // (R, D)
  void* dweights;                // (R,) or null
  int64_t num_rows, hidden;
  int threads;
};

// a = weights[r] * act(h[r] + bias[expert of r]) and its backward, over rows in expert order.
struct ActivationArgs {
  Dtype dtype;  // of h, bias, a, da, dh
  Activation activation;
  const void* h;                  // (R, F), or (R, 2F) gate half first for swiglu
  const void* bias;               // (E, columns of h) or null
  const void* weights;            // (R,) or null (all 1): f64 for f64, else f32
  const int32_t* expert_offsets;  // (E + 1,), or null: one expert
  void* a;                        // (R, F): forward result; by the backward again, or null
  const void* da;                 // (R, F), backward
  void* dh;                       // (R, columns of h), backward
  void* dweights;                 // (R,) or null, backward: <da, act(h + bias)>
  int64_t num_rows, experts, intermediate;
  int threads;
};

struct ExpertMlpArgs {
  Dtype dtype;  // of x, w_in, w_out, the biases, h, out
  Activation activation;
  bool native_bf16;               // multiply bf16 operands as they are
  bool w_in_transposed;           // w_in and dw_in are (E, D, F or 2F)
  bool w_out_transposed;          // w_out and dw_out are (E, F, D)
  const void* x;                  // (T, D)
  const void* w_in;               // (E, F or 2F, D)
  const void* w_out;              // (E, D, F)
  const void* bias_in;            // (E, F or 2F) or null
  const void* bias_out;           // (E, D) or null
  const void* weights;            // (R,): f64 for f64, else f32
  const int32_t* token_indices;   // (R,)
  const int32_t* row_indices;     // (R,)
  const int32_t* row_offsets;     // (T + 1,)
  const int32_t* expert_offsets;  // (E + 1,)
  void* h;  // (R, F or 2F) product before bias: forward output, backward input
  int64_t tokens, experts, rows, hidden, intermediate;
  int threads;
};

struct ExpertMlpFwdArgs : ExpertMlpArgs {
  void* out;  // (T, D)
};

// Outputs may be null where no gradient is wanted.
struct ExpertMlpBwdArgs : ExpertMlpArgs {
  const void* dout;  // (T, D)
  void* dx;
  void* dw_in;
  void* dw_out;
  void* dbias_in;
  void* dbias_out;
  void* dweights;
};

struct GroupedGemmArgs {
  Dtype dtype;
  bool native_bf16;
  bool w_transposed;              // w and dw are (E, I, O)
  const void* rows;               // (R, I)
  const void* w;                  // (E, O, I)
  const int32_t* expert_offsets;  // (E + 1,)
  void* out;                      // (R, O), forward
  const void* dout;               // (R, O), backward
  void* drows;                    // (R, I) or null, backward
  void* dw;                       // (E, O, I) or null, backward
  int64_t experts, num_rows, in_features, out_features;
  int threads;
};

struct Kernels {
  // The routers return false when a logit is NaN or infinite.
  bool (*token_choice_fwd)(const TokenChoiceArgs&);
  bool (*expert_choice_fwd)(const ExpertChoiceArgs&);
  void (*route_bwd)(const RouteBwdArgs&);
  void (*affinity_fwd)(const AffinityArgs&);
  void (*similarity_fwd)(const SimilarityArgs&);
  void (*similarity_bwd)(const SimilarityArgs&);
  void (*combine)(const CombineArgs&);
  void (*gather)(const GatherArgs&);
  void (*activation_fwd)(const ActivationArgs&);
  void (*activation_bwd)(const ActivationArgs&);
  void (*expert_mlp_fwd)(const ExpertMlpFwdArgs&);
  void (*expert_mlp_bwd)(const ExpertMlpBwdArgs&);
  void (*grouped_gemm_fwd)(const GroupedGemmArgs&);
  void (*grouped_gemm_bwd)(const GroupedGemmArgs&);
  Blas::Gemm (*gemm_bf16)();  // null where the processor cannot multiply pairs
};

namespace baseline {
const Kernels& kernels();
}
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}

}  // namespace moe
