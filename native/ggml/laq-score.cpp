#include "laq-score.h"

#include "ggml-impl.h"

struct ggml_tensor * ggml_laq_score(struct ggml_context * ctx, struct ggml_tensor * q, struct ggml_tensor * k,
                                    struct ggml_tensor * mask, struct ggml_tensor * sinks, float scale, float softcap) {
    GGML_ASSERT(q->type == GGML_TYPE_F32);
    GGML_ASSERT(q->ne[0] == k->ne[0]);
    GGML_ASSERT(q->ne[2] % k->ne[2] == 0);
    GGML_ASSERT(q->ne[3] == 1 && k->ne[3] == 1);
    GGML_ASSERT(q->nb[0] == ggml_type_size(q->type));
    GGML_ASSERT(k->nb[0] == ggml_type_size(k->type));

    if (mask) {
        GGML_ASSERT(mask->type == GGML_TYPE_F32);
        GGML_ASSERT(ggml_is_contiguous(mask));
        GGML_ASSERT(mask->ne[0] == k->ne[1] && mask->ne[1] == q->ne[1]);
    }
    if (sinks) {
        GGML_ASSERT(sinks->type == GGML_TYPE_F32);
        GGML_ASSERT(ggml_is_contiguous(sinks));
        GGML_ASSERT(sinks->ne[0] == q->ne[2]);
    }

    struct ggml_tensor * result = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, k->ne[1], k->ne[2]);

    const float op_params[2] = { scale, softcap };
    ggml_set_op_params(result, op_params, sizeof(op_params));

    result->op     = GGML_OP_LAQ_SCORE;
    result->src[0] = q;
    result->src[1] = k;
    result->src[2] = mask;
    result->src[3] = sinks;

    return result;
}
