// LAQ_SCORE in ggml-metal: sizes, memory and order of the kernels of laq-score.metal

#include "laq-metal.h"

#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "laq-score-impl.h"
#include "laq-score.metal"

#include <algorithm>
#include <cstdint>
#include <cstdio>

namespace {

constexpr int64_t MIN_CHUNK  = 128;  // keys
constexpr int64_t MAX_CHUNKS = 128;  // of a KV head
constexpr size_t  ALIGNMENT  = 64;   // of the parts of the scratch memory

struct score_plan {
    ggml_metal_kargs_laq_score args;

    size_t offs_queries;  // F32 [n_embd, n_rows_pad, n_head_kv]
    size_t offs_stats;    // F32 [2, n_rows_pad, n_chunks*n_split, n_head_kv]
    size_t offs_lse;      // F32 [n_rows_pad, n_head_kv]
    size_t size;          // of the result and all of the above
    size_t smem;          // bytes of a thread group

    int n_head_kv;
};

// As many keys as fit into the memory of a thread group, and a part of them for each SIMD group if there are fewer
// blocks of rows than SIMD groups. A part is at least 8 keys.
void set_tiles(ggml_metal_kargs_laq_score & args) {
    args.n_tile  = args.n_embd <= 128 ? 32 : args.n_embd <= 256 ? 16 : 8;
    args.n_split = 1;
    while (args.n_split < args.n_tile / 8 && args.n_split * args.n_rows_pad / LAQ_SCORE_NR < LAQ_SCORE_NSG) {
        args.n_split *= 2;
    }
}

void set_chunks(ggml_metal_kargs_laq_score & args) {
    const int64_t n_chunk = std::max<int64_t>(MIN_CHUNK, (args.n_kv + MAX_CHUNKS - 1) / MAX_CHUNKS);

    args.n_chunk  = (int32_t) GGML_PAD(n_chunk, 32);
    args.n_chunks = (args.n_kv + args.n_chunk - 1) / args.n_chunk;
}

void set_sizes(score_plan & plan, const ggml_tensor * op) {
    const ggml_metal_kargs_laq_score & args = plan.args;

    const size_t n_rows  = (size_t) args.n_rows_pad * plan.n_head_kv;
    const size_t queries = n_rows * args.n_embd * sizeof(float);
    const size_t stats   = n_rows * args.n_chunks * args.n_split * 2 * sizeof(float);

    plan.offs_queries = GGML_PAD(ggml_nbytes(op), ALIGNMENT);
    plan.offs_stats   = plan.offs_queries + GGML_PAD(queries, ALIGNMENT);
    plan.offs_lse     = plan.offs_stats + GGML_PAD(stats, ALIGNMENT);
    plan.size         = plan.offs_lse + n_rows * sizeof(float);

    const size_t n_keys   = (size_t) args.n_tile * (args.n_embd + LAQ_SCORE_PAD);
    const size_t n_logits = (size_t) LAQ_SCORE_NSG * LAQ_SCORE_NR * LAQ_SCORE_LDX;

    plan.smem = GGML_PAD((n_keys + n_logits + 32 * LAQ_SCORE_NSG) * sizeof(float), 16);
}

// of either node; its sizes are those of the second one
score_plan make_plan(const ggml_tensor * op) {
    const ggml_tensor * q = op->src[0];
    const ggml_tensor * k = op->src[1];

    const float scale   = ggml_laq_score_scale(op);
    const float softcap = ggml_laq_score_softcap(op);

    score_plan plan = {};
    plan.n_head_kv  = (int) k->ne[2];

    ggml_metal_kargs_laq_score & args = plan.args;

    args.n_embd     = (int32_t) q->ne[0];
    args.n_q        = (int32_t) q->ne[1];
    args.n_group    = (int32_t) (q->ne[2] / k->ne[2]);
    args.n_rows     = args.n_q * args.n_group;
    args.n_rows_pad = GGML_PAD(args.n_rows, LAQ_SCORE_NR);
    args.n_kv       = (int32_t) k->ne[1];
    args.has_mask   = op->src[2] != nullptr;
    args.has_sinks  = op->src[3] != nullptr;
    args.scale      = softcap == 0.0f ? scale : scale / softcap;
    args.softcap    = softcap;
    args.nbq1       = q->nb[1];
    args.nbq2       = q->nb[2];
    args.nbk1       = k->nb[1];
    args.nbk2       = k->nb[2];

    set_tiles(args);
    set_chunks(args);
    set_sizes(plan, op);
    return plan;
}

// bytes that a row of K has to be aligned to; 0 for a type without a kernel
size_t row_alignment(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:  return 16;
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16: return 8;
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q5_1: return 2;
        default:             return 0;
    }
}

ggml_metal_buffer_id buffer_of(const ggml_tensor * t) {
    const ggml_backend_buffer_t buffer = t->view_src ? t->view_src->buffer : t->buffer;
    return ggml_metal_buffer_get_id((ggml_metal_buffer_t) buffer->context, t);
}

ggml_metal_pipeline_with_params pipeline_of(ggml_metal_library_t lib, const char * kernel, const char * type) {
    char name[64];
    snprintf(name, sizeof(name), "kernel_laq_score_%s%s%s", kernel, type ? "_" : "", type ? type : "");

    ggml_metal_pipeline_with_params res = ggml_metal_library_get_pipeline(lib, name);
    if (!res.pipeline) {
        res = ggml_metal_library_compile_pipeline(lib, name, name, nullptr);
    }
    return res;
}

// buffers of a kernel from index 1 on; 0 has the arguments
void bind(ggml_metal_encoder_t enc, const score_plan & plan, std::initializer_list<ggml_metal_buffer_id> buffers) {
    ggml_metal_kargs_laq_score args = plan.args;
    ggml_metal_encoder_set_bytes(enc, &args, sizeof(args), 0);

    int idx = 1;
    for (const ggml_metal_buffer_id & buffer : buffers) {
        ggml_metal_encoder_set_buffer(enc, buffer, idx++);
    }
}

}  // namespace

// Both nodes have q and k. The first one is supported where the second one is, so that they are on one device.
bool ggml_metal_laq_supported(const ggml_tensor * node, const ggml_metal_device_props * props) {
    if (!ggml_laq_is_score(node) && !ggml_laq_is_score_work(node)) {
        return false;
    }
    const ggml_tensor * q = node->src[0];
    const ggml_tensor * k = node->src[1];

    const size_t alignment = row_alignment(k->type);
    if (alignment == 0 || q->type != GGML_TYPE_F32 || node->type != GGML_TYPE_F32) {
        return false;
    }
    if (!props->has_simdgroup_mm || !props->has_simdgroup_reduction) {
        return false;
    }
    if (q->ne[0] % 16 != 0 || q->nb[1] % sizeof(float) != 0 || q->nb[2] % sizeof(float) != 0) {
        return false;
    }
    if (k->nb[1] % alignment != 0 || k->nb[2] % alignment != 0 || k->view_offs % alignment != 0) {
        return false;
    }
    // the kernels count keys and rows in 32 bits
    if (k->ne[1] > INT32_MAX / 2 || q->ne[1] * q->ne[2] > INT32_MAX / (32 * q->ne[0])) {
        return false;
    }
    return make_plan(node).smem <= props->max_theadgroup_memory_size;
}

size_t ggml_metal_laq_extra(const ggml_tensor * node) {
    return ggml_laq_is_score(node) ? make_plan(node).size - ggml_nbytes(node) : 0;
}

static void encode_score(ggml_metal_library_t lib, ggml_metal_encoder_t enc, const ggml_tensor * op) {
    const score_plan plan = make_plan(op);
    const char *     type = ggml_type_name(op->src[1]->type);

    const ggml_metal_buffer_id q   = buffer_of(op->src[0]);
    const ggml_metal_buffer_id k   = buffer_of(op->src[1]);
    const ggml_metal_buffer_id dst = buffer_of(op);
    // an optional source that is not there is not read
    const ggml_metal_buffer_id mask  = op->src[2] ? buffer_of(op->src[2]) : q;
    const ggml_metal_buffer_id sinks = op->src[3] ? buffer_of(op->src[3]) : q;

    const ggml_metal_buffer_id queries = { dst.metal, dst.offs + plan.offs_queries };
    const ggml_metal_buffer_id stats   = { dst.metal, dst.offs + plan.offs_stats };
    const ggml_metal_buffer_id lse     = { dst.metal, dst.offs + plan.offs_lse };

    const auto pass_over_keys = [&](const char * kernel) {
        ggml_metal_encoder_set_pipeline(enc, pipeline_of(lib, kernel, type));
        bind(enc, plan, { queries, k, mask, stats, lse, dst });
        ggml_metal_encoder_set_threadgroup_memory_size(enc, plan.smem, 0);
        ggml_metal_encoder_dispatch_threadgroups(enc, plan.args.n_chunks, plan.n_head_kv, 1, 32, LAQ_SCORE_NSG, 1);
    };

    ggml_metal_encoder_set_pipeline(enc, pipeline_of(lib, "queries", nullptr));
    bind(enc, plan, { q, queries });
    ggml_metal_encoder_dispatch_threadgroups(enc, plan.args.n_rows_pad, plan.n_head_kv, 1, 32, 1, 1);
    ggml_metal_encoder_memory_barrier(enc);

    pass_over_keys("stats");
    ggml_metal_encoder_memory_barrier(enc);

    ggml_metal_encoder_set_pipeline(enc, pipeline_of(lib, "merge", nullptr));
    bind(enc, plan, { stats, sinks, lse });
    ggml_metal_encoder_dispatch_threadgroups(enc, plan.args.n_rows_pad, plan.n_head_kv, 1, 32, 1, 1);
    ggml_metal_encoder_memory_barrier(enc);

    pass_over_keys("sum");
}

// the kernels of the second node do all the work, in the memory after its result
void ggml_metal_laq_encode(ggml_metal_library_t lib, ggml_metal_encoder_t enc, const ggml_tensor * node) {
    if (ggml_laq_is_score(node)) {
        encode_score(lib, enc, node);
    }
}
