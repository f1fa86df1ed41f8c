#include "laq-graph-capture.h"

ggml_tensor * laq_ring_view(ggml_context * ctx, const laq_layer & layer, bool outputs) {
    ggml_tensor * ring = layer.ring;
    return ggml_view_2d(ctx, ring, outputs ? layer.n_ring_out() : layer.n_ring_q(), ring->ne[1], ring->nb[1],
                        outputs ? layer.n_ring_q() * ring->nb[0] : 0);
}

// rows: [n_row, n_tokens]
static void capture(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * ring, ggml_tensor * rows,
                    const laq_captured & to) {
    const int64_t n = to.slots->ne[0];
    ggml_tensor * captured =
        to.rows ? ggml_get_rows(ctx, rows, to.rows)
                : ggml_view_2d(ctx, rows, rows->ne[0], n, rows->nb[1], (rows->ne[1] - n) * rows->nb[1]);
    ggml_build_forward_expand(gf, ggml_set_rows(ctx, ring, captured, to.slots));
}

void laq_graph_queries(ggml_context * ctx, ggml_cgraph * gf, const laq_layer & layer, ggml_tensor * q,
                       const laq_captured & to) {
    if (q->nb[1] != q->ne[0] * q->nb[0]) {
        q = ggml_cont(ctx, q);
    }
    ggml_tensor * rows = ggml_view_2d(ctx, q, q->ne[0] * q->ne[1], q->ne[2], q->nb[2], 0);
    capture(ctx, gf, laq_ring_view(ctx, layer, false), rows, to);
}

void laq_graph_outputs(ggml_context * ctx, ggml_cgraph * gf, const laq_layer & layer, ggml_tensor * out,
                       const laq_captured & to) {
    capture(ctx, gf, laq_ring_view(ctx, layer, true), out, to);
}
