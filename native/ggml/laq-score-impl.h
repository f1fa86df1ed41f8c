#pragma once

// LAQ_SCORE: what its constructor shares with the backends

#include "laq-score.h"

#include "ggml-impl.h"

// Sources of the first node: q, k, mask. Of the second one: q, k, mask, sinks, the first one.

// op_params: what GGML_OP_CUSTOM has there, then scale and softcap
#define GGML_LAQ_SCORE_PARAMS ((sizeof(struct ggml_custom_op_params) + sizeof(float) - 1) / sizeof(float))

static inline float ggml_laq_score_scale(const struct ggml_tensor * node) {
    return ggml_get_op_params_f32(node, GGML_LAQ_SCORE_PARAMS);
}

static inline float ggml_laq_score_softcap(const struct ggml_tensor * node) {
    return ggml_get_op_params_f32(node, GGML_LAQ_SCORE_PARAMS + 1);
}

#ifdef __cplusplus
extern "C" {
#endif

// keys of one work item of the CPU's kernel
#define GGML_LAQ_SCORE_CHUNK 512

// The CPU's kernel. It is compiled for the machine, so it is part of ggml-cpu; the nodes point to functions of ggml-base,
// which call it.
struct ggml_laq_score_cpu {
    void (*compute_work)(struct ggml_tensor * dst, int ith, int nth);
    void (*compute_score)(struct ggml_tensor * dst, int ith, int nth);

    int rank;  // 0: not for this machine; of several variants of ggml-cpu the highest one counts
    struct ggml_laq_score_cpu * next;  // belongs to the two functions below
};

// From the time when a variant of ggml-cpu is loaded to the time when it is unloaded.
GGML_API void ggml_laq_score_cpu_add(struct ggml_laq_score_cpu * kernel);
GGML_API void ggml_laq_score_cpu_remove(struct ggml_laq_score_cpu * kernel);

#ifdef __cplusplus
}
#endif
