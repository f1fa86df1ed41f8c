#include "laq-graph-score.h"

#include "laq-graph-capture.h"
#include "laq-score.h"

#include <cmath>
#include <cstdlib>
#include <cstring>

bool laq_score_fused(const ggml_tensor * score, ggml_backend_dev_t dev) {
    const char * asked = getenv("LAQ_SCORE");
    return !(asked && strcmp(asked, "composed") == 0) && dev && ggml_laq_score_supported(dev, score);
}

ggml_tensor * laq_attention(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * mask,
                            ggml_tensor * sinks, float scale, float softcap) {
    const int64_t n_kv      = k->ne[1];
    const int64_t n_head_kv = k->ne[2];

    ggml_tensor * kq = ggml_mul_mat(ctx, k, ggml_cont(ctx, q));  // [n_kv, n_q, n_head]
    ggml_prec_set_acc(kq, GGML_PREC_F32);

    if (softcap != 0.0f) {
        kq    = ggml_scale(ctx, ggml_tanh(ctx, ggml_scale(ctx, kq, scale / softcap)), softcap);
        scale = 1.0f;
    }
    kq = ggml_soft_max_ext(ctx, kq, mask, scale, 0.0f);
    ggml_soft_max_add_sinks(kq, sinks);

    // the heads of a group lie next to each other
    return ggml_reshape_3d(ctx, kq, n_kv, q->ne[1] * q->ne[2] / n_head_kv, n_head_kv);
}

ggml_tensor * laq_score_composed(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * mask,
                                 ggml_tensor * sinks, float scale, float softcap) {
    const int64_t n_head_kv = k->ne[2];
    const int64_t n_group   = q->ne[2] / n_head_kv;

    // sum over the rows
    ggml_tensor * kq = laq_attention(ctx, q, k, mask, sinks, scale, softcap);
    kq               = ggml_sum_rows(ctx, ggml_cont(ctx, ggml_transpose(ctx, kq)));
    return ggml_reshape_2d(ctx, ggml_scale(ctx, kq, 1.0f / (float) n_group), k->ne[1], n_head_kv);
}

laq_score_nodes::laq_score_nodes(ggml_context * ctx, int64_t n_kv, int64_t n_q) {
    slots = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_q);
    mask  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_kv, n_q);
    ggml_set_input(slots);
    ggml_set_input(mask);
}

ggml_tensor * laq_graph_observed(laq_compute & compute, const laq_layer & layer, ggml_tensor * slots, bool outputs) {
    ggml_context * ctx  = compute.ctx();
    ggml_tensor *  rows = ggml_get_rows(ctx, laq_ring_view(ctx, layer, outputs), slots);
    compute.place(rows, layer.ring);
    rows = ggml_reshape_3d(ctx, rows, rows->ne[0] / layer.n_head, layer.n_head, rows->ne[1]);
    return ggml_permute(ctx, rows, 0, 2, 1, 3);
}

bool laq_graph_score(laq_compute & compute, laq_score_nodes & nodes, const laq_layer & layer, ggml_tensor * k,
                     const ggml_tensor * beside) {
    ggml_context * ctx   = compute.ctx();
    ggml_tensor *  q     = laq_graph_observed(compute, layer, nodes.slots, false);
    ggml_tensor *  res   = ggml_laq_score(ctx, q, k, nodes.mask, layer.sinks, layer.kq_scale, layer.softcap);
    const bool     fused = laq_score_fused(res, laq_device_of(beside->buffer));
    if (fused) {
        compute.place(ggml_laq_score_work(res), beside);
    } else {
        res = laq_score_composed(ctx, q, k, nodes.mask, layer.sinks, layer.kq_scale, layer.softcap);
    }
    ggml_set_output(res);
    compute.add(res, beside);
    nodes.scores.push_back(res);
    return fused;
}

bool laq_graph_score_cells(laq_compute & compute, laq_score_nodes & nodes, const laq_store & store, int32_t seq_id) {
    bool fused = true;
    for (uint32_t ikv = 0; ikv < store.layers.size(); ++ikv) {
        const laq_layer & layer = store.layers[ikv];
        ggml_tensor *     k     = store.k(ikv, seq_id);
        ggml_tensor *     keys = ggml_view_3d(compute.ctx(), k, layer.n_embd_head_k, nodes.mask->ne[0], layer.n_head_kv,
                                              k->nb[1], ggml_row_size(k->type, layer.n_embd_head_k), 0);
        fused &= laq_graph_score(compute, nodes, layer, keys, k);
    }
    return fused;
}

void laq_graph_score_columns(laq_compute & compute, laq_score_nodes & nodes, int32_t seq_id,
                             const laq_columns_part & keys, int64_t n_cells) {
    const laq_store & store = keys.columns.store;
    ggml_context *    ctx   = compute.ctx();
    ggml_tensor *     k     = store.k(keys.ikv, seq_id);
    ggml_tensor *     cells = ggml_view_2d(ctx, k, k->ne[0], n_cells, k->nb[1], 0);
    ggml_tensor *     all   = laq_graph_columns(ctx, cells, keys, nodes.mask->ne[0]);
    compute.place_on_cpu(all);
    laq_graph_score(compute, nodes, store.layers[keys.ikv], ggml_permute(ctx, all, 0, 2, 1, 3), k);
}

void laq_set_observed(ggml_tensor * slots, ggml_tensor * mask, const std::vector<laq_observed> & observed,
                      const std::vector<int32_t> & pos) {
    std::vector<int32_t> all_slots(observed.size());
    std::vector<float>   visible(observed.size() * pos.size());
    for (size_t j = 0; j < observed.size(); ++j) {
        all_slots[j] = observed[j].slot;
        for (size_t i = 0; i < pos.size(); ++i) {
            visible[j * pos.size() + i] = pos[i] <= observed[j].pos ? 0.0f : -INFINITY;
        }
    }
    ggml_backend_tensor_set(slots, all_slots.data(), 0, ggml_nbytes(slots));
    ggml_backend_tensor_set(mask, visible.data(), 0, ggml_nbytes(mask));
}
