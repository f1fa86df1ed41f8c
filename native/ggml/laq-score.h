#pragma once

// GGML_OP_LAQ_SCORE: how much attention a set of queries pays to each cached key

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// q:     F32 [n_embd_head, n_q,  n_head   ]   rows contiguous, n_head % n_head_kv == 0
// k:     any [n_embd_head, n_kv, n_head_kv]   rows contiguous: a view of the KV cache
// mask:  F32 [n_kv, n_q]                      added to the logits, optional
// sinks: F32 [n_head]                         one more logit in each softmax, optional
// res:   F32 [n_kv, n_head_kv]
//
// logit[h,j,i] = softcap*tanh(scale*q.k/softcap)  (softcap == 0: scale*q.k)
// res[g,i]     = mean over heads h of group g (sum over queries j (softmax_i(logit[h,j,i] + mask[j,i])))
GGML_API struct ggml_tensor * ggml_laq_score(struct ggml_context * ctx, struct ggml_tensor * q, struct ggml_tensor * k,
                                             struct ggml_tensor * mask, struct ggml_tensor * sinks, float scale,
                                             float softcap);

// The same, and what the queries get: only the CPU has it.
//
// v:   any [n_embd_head_v, n_kv, n_head_kv]   rows contiguous
// res: F32 [n_kv*n_head_kv + n_embd_head_v*n_q*n_head]: the scores, then
// out[h,j] = sum over i (softmax_i(logit[h,j,i] + mask[j,i]) * v[g,i])
GGML_API struct ggml_tensor * ggml_laq_score_outputs(struct ggml_context * ctx, struct ggml_tensor * q,
                                                     struct ggml_tensor * k, struct ggml_tensor * v,
                                                     struct ggml_tensor * mask, struct ggml_tensor * sinks, float scale,
                                                     float softcap);

// bytes of work buffer the CPU kernel needs
size_t ggml_laq_score_work_size(const struct ggml_tensor * dst, int n_tasks);

void ggml_compute_forward_laq_score(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
