#pragma once

// Nodes that score keys: how much attention observed queries pay to each.

#include "laq-compute.h"
#include "laq-graph-columns.h"
#include "laq-store.h"

#include <vector>

// an observed query: where it is, and what its output tells
struct laq_observed {
    int32_t    slot;
    int32_t    pos;
    laq_output output;
};

// Whether the fused kernel runs on a device; env LAQ_SCORE = composed: nowhere.
bool laq_score_fused(const ggml_tensor * score, ggml_backend_dev_t dev);

// attention of queries [d, n_q, n_head] to keys [d, n_kv, n_head_kv], rows of a group together: [n_kv, n_rows,
// n_head_kv]
ggml_tensor * laq_attention(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * mask,
                            ggml_tensor * sinks, float scale, float softcap);

// ggml_laq_score() from existing operations; stores the attention of all queries
ggml_tensor * laq_score_composed(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * mask,
                                 ggml_tensor * sinks, float scale, float softcap);

// inputs of a score graph, and its results
struct laq_score_nodes {
    ggml_tensor *              slots = nullptr;  // I32 [n_q]
    ggml_tensor *              mask  = nullptr;  // F32 [n_kv, n_q]
    std::vector<ggml_tensor *> scores;           // of each layer added: F32 [n_kv, n_head_kv]

    laq_score_nodes(ggml_context * ctx, int64_t n_kv, int64_t n_q);
};

// queries of the ring of a layer: [n_embd_head_k, n_q, n_head]; or its outputs
ggml_tensor * laq_graph_observed(laq_compute & compute, const laq_layer & layer, ggml_tensor * slots, bool outputs);

// Score the keys of a layer [n_embd_head_k, n_kv, n_head_kv], where `beside` is. Returns whether the fused kernel does.
bool laq_graph_score(laq_compute & compute, laq_score_nodes & nodes, const laq_layer & layer, ggml_tensor * k,
                     const ggml_tensor * beside);

// The same for the cells of a sequence, as many as the mask has, in all layers
bool laq_graph_score_cells(laq_compute & compute, laq_score_nodes & nodes, const laq_store & store, int32_t seq_id);

// The same for the keys of all tokens of a sequence, which are brought together as columns, as many as the mask has. Of
// the cells, the first n_cells are read.
void laq_graph_score_columns(laq_compute & compute, laq_score_nodes & nodes, int32_t seq_id,
                             const laq_columns_part & keys, int64_t n_cells);

// What observed queries see of keys: none after their own position. pos: of each key, INT32_MAX = there is none
void laq_set_observed(ggml_tensor * slots, ggml_tensor * mask, const std::vector<laq_observed> & observed,
                      const std::vector<int32_t> & pos);
