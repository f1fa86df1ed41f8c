#pragma once

// Nodes of the model's graph that write the queries and outputs of its last tokens to the ring of a layer.

#include "laq-store.h"

// the queries in the ring of a layer, or the outputs: F16 [n_row, n_slots]
ggml_tensor * laq_ring_view(ggml_context * ctx, const laq_layer & layer, bool outputs);

// inputs of the graph: which rows of a ubatch go to which slots
struct laq_captured {
    ggml_tensor * slots;           // I64 [n]
    ggml_tensor * rows = nullptr;  // I32 [n], null = the last n rows
};

// q: [n_embd_head_k, n_head, n_tokens]
void laq_graph_queries(ggml_context * ctx, ggml_cgraph * gf, const laq_layer & layer, ggml_tensor * q,
                       const laq_captured & to);

// out: [n_embd_head_v*n_head, n_tokens]
void laq_graph_outputs(ggml_context * ctx, ggml_cgraph * gf, const laq_layer & layer, ggml_tensor * out,
                       const laq_captured & to);
