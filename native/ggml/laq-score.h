#pragma once

// The op LAQ_SCORE: how much attention a set of queries pays to each cached key
//
// It is two nodes of GGML_OP_CUSTOM. The CPU backend calls the function of such a node, the CUDA and the Metal backend
// recognise it. No other backend computes it, although some say that they compute every op: ask
// ggml_laq_score_supported().

#include "ggml-backend.h"
#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

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

// The first node, a source of the one that ggml_laq_score() returns: F32 [n], what the CPU's second pass over K needs of
// its first one. Both nodes belong on one device. Whoever places tensors by hand gives this one memory, too.
GGML_API struct ggml_tensor * ggml_laq_score_work(const struct ggml_tensor * score);

// Whether a node is the second or the first one of this op.
GGML_API bool ggml_laq_is_score(const struct ggml_tensor * node);
GGML_API bool ggml_laq_is_score_work(const struct ggml_tensor * node);

// Whether a device computes the op. false for every device that does not know it: remote ones (RPC), and those that
// stand for several (split_mode = tensor).
GGML_API bool ggml_laq_score_supported(ggml_backend_dev_t dev, const struct ggml_tensor * score);

#ifdef __cplusplus
}
#endif
