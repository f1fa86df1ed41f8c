#include "laq-score.h"

#include "ggml-impl.h"

static void check_args(const ggml_tensor * q, const ggml_tensor * k, const ggml_tensor * mask,
                       const ggml_tensor * sinks) {
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
}

static ggml_tensor * set_op(ggml_tensor * result, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * mask,
                            ggml_tensor * sinks, float scale, float softcap) {
    const float op_params[2] = { scale, softcap };
    ggml_set_op_params(result, op_params, sizeof(op_params));

    result->op     = GGML_OP_LAQ_SCORE;
    result->src[0] = q;
    result->src[1] = k;
    result->src[2] = mask;
    result->src[3] = sinks;
    result->src[4] = v;

    return result;
}

struct ggml_tensor * ggml_laq_score(struct ggml_context * ctx, struct ggml_tensor * q, struct ggml_tensor * k,
                                    struct ggml_tensor * mask, struct ggml_tensor * sinks, float scale, float softcap) {
    check_args(q, k, mask, sinks);

    return set_op(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, k->ne[1], k->ne[2]), q, k, nullptr, mask, sinks, scale,
                  softcap);
}

struct ggml_tensor * ggml_laq_score_outputs(struct ggml_context * ctx, struct ggml_tensor * q, struct ggml_tensor * k,
                                            struct ggml_tensor * v, struct ggml_tensor * mask,
                                            struct ggml_tensor * sinks, float scale, float softcap) {
    check_args(q, k, mask, sinks);
    GGML_ASSERT(v->ne[1] == k->ne[1] && v->ne[2] == k->ne[2] && v->ne[3] == 1);
    GGML_ASSERT(v->nb[0] == ggml_type_size(v->type));

    const int64_t n = k->ne[1] * k->ne[2] + v->ne[0] * q->ne[1] * q->ne[2];
    return set_op(ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n), q, k, v, mask, sinks, scale, softcap);
}
