#include "laq-graph-fit.h"

#include "laq-solve.h"

// Sums over tokens are fast in whole vectors: a few tokens more are in the graph, which no query sees.
static constexpr int64_t N_VECTOR = 16;  // floats of the longest vector

// V of a layer as rows of cells. Where it is transposed: a copy of the first n_from cells, which go back by turn_back()
static ggml_tensor * value_rows(ggml_context * ctx, bool v_trans, ggml_tensor * v, int64_t n_from) {
    if (!v_trans) {
        return v;
    }
    ggml_tensor * channels = ggml_view_2d(ctx, v, n_from, v->ne[0], v->ne[1] * ggml_type_size(v->type), 0);
    return ggml_cont(ctx, ggml_transpose(ctx, channels));
}

static ggml_tensor * turn_back(ggml_context * ctx, ggml_tensor * v, ggml_tensor * rows) {
    const int64_t n_from   = rows->ne[1];
    ggml_tensor * channels = ggml_view_2d(ctx, v, n_from, v->ne[0], v->ne[1] * ggml_type_size(v->type), 0);
    // in two steps: where CUDA transposes while it copies, it takes what it writes for contiguous (ggml-cuda/cpy.cu)
    return ggml_cpy(ctx, ggml_cont(ctx, ggml_transpose(ctx, rows)), channels);
}

// attention of the observed queries to the cells that stay: [n, m, n_head_kv]
static ggml_tensor * attention_to(laq_compute & compute, const laq_fit_nodes & nodes, const laq_layer & layer,
                                  ggml_tensor * k) {
    ggml_context * ctx  = compute.ctx();
    ggml_tensor *  keys = ggml_get_rows(ctx, k, nodes.cells);
    keys                = ggml_reshape_3d(ctx, keys, layer.n_embd_head_k, layer.n_head_kv, nodes.cells->ne[0]);

    ggml_tensor * q = laq_graph_observed(compute, layer, nodes.slots, false);
    return laq_attention(ctx, q, ggml_permute(ctx, keys, 0, 2, 1, 3), nodes.mask, layer.sinks, layer.kq_scale,
                         layer.softcap);
}

static void add_layer(laq_compute & compute, laq_fit_nodes & nodes, const laq_store & store, int32_t seq_id,
                      uint32_t ikv, int64_t n_from, const float * ridge) {
    ggml_context *    ctx   = compute.ctx();
    const laq_layer & layer = store.layers[ikv];
    const int64_t     n     = nodes.cells->ne[0];
    const int64_t     n_h   = layer.n_head_kv;
    const int64_t     d     = layer.n_embd_head_v;
    ggml_tensor *     v     = store.v(ikv, seq_id);

    nodes.free.push_back(ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n, 1, n_h));
    ggml_set_input(nodes.free.back());

    ggml_tensor * p = attention_to(compute, nodes, layer, store.k(ikv, seq_id));
    compute.place(p, v);
    ggml_tensor * x = ggml_mul(ctx, p, nodes.free.back());
    ggml_tensor * g = ggml_mul_mat(ctx, x, x);
    ggml_prec_set_acc(g, GGML_PREC_F32);

    ggml_tensor * rows   = value_rows(ctx, store.v_trans(), v, n_from);
    ggml_tensor * values = ggml_get_rows(ctx, rows, nodes.cells);  // [d*n_head_kv, n]
    compute.place(values, v);
    ggml_tensor * by_head = ggml_permute(ctx, ggml_reshape_3d(ctx, values, d, n_h, n), 1, 2, 0, 3);
    ggml_tensor * pv      = ggml_mul_mat(ctx, ggml_cont(ctx, by_head), p);  // [d, m, n_head_kv]
    ggml_prec_set_acc(pv, GGML_PREC_F32);
    ggml_tensor * out = ggml_cont(ctx, laq_graph_observed(compute, layer, nodes.slots, true));
    out               = ggml_reshape_3d(ctx, out, d, p->ne[1], n_h);

    ggml_tensor * z = laq_solve(ctx, g, ggml_sub(ctx, out, pv), ridge);  // [m, d, n_head_kv]
    compute.place_on_cpu(z);

    ggml_tensor * xt    = ggml_cont(ctx, ggml_transpose(ctx, x));  // [m, n, n_head_kv]
    ggml_tensor * delta = ggml_mul_mat(ctx, z, xt);                // [d, n, n_head_kv]
    ggml_prec_set_acc(delta, GGML_PREC_F32);
    delta = ggml_cont(ctx, ggml_permute(ctx, delta, 0, 2, 1, 3));
    compute.place(xt, v);
    compute.place(delta, v);

    ggml_tensor * fitted = ggml_add(ctx, values, ggml_reshape_2d(ctx, delta, d * n_h, n));
    ggml_tensor * done   = ggml_set_rows(ctx, rows, ggml_view_2d(ctx, fitted, d * n_h, nodes.n_real, fitted->nb[1], 0),
                                         ggml_view_1d(ctx, nodes.cells, nodes.n_real, 0));
    if (store.v_trans()) {
        done = turn_back(ctx, v, done);
    }
    compute.add(done, v);
}

laq_fit_nodes laq_graph_fit(laq_compute & compute, const laq_store & store, int32_t seq_id, int64_t n_real,
                            int64_t n_from, int64_t n_q, const float * ridge) {
    ggml_context * ctx = compute.ctx();
    const int64_t  n   = GGML_PAD(n_real, N_VECTOR);

    laq_fit_nodes nodes;
    nodes.n_real = n_real;
    nodes.slots  = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_q);
    nodes.cells  = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
    nodes.mask   = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n, n_q);
    for (ggml_tensor * input : { nodes.slots, nodes.cells, nodes.mask }) {
        ggml_set_input(input);
    }
    for (uint32_t ikv = 0; ikv < store.layers.size(); ++ikv) {
        add_layer(compute, nodes, store, seq_id, ikv, n_from, ridge);
    }
    return nodes;
}
