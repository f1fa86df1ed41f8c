#pragma once

// Nodes that fit values: V of what stays changes so that observed queries get the outputs they had. Attention Matching
// (arXiv 2602.16284) solves for the values of a compacted cache alike. Here a ridge holds the values where they were.
//
// One KV head, the rows of its query heads below each other (m = n_q * n_group), n tokens that stay:
//   P [m][n]    attention of the observed queries to them
//   X [m][n]    P where V may change, 0 where it may not: pinned tokens keep their V
//   R [m][d_v]  the outputs, less P V
//   V += X^T (X X^T + ridge I)^-1 R

#include "laq-graph-score.h"

struct laq_fit_nodes {
    int64_t                    n_real = 0;        // tokens that stay; n is this rounded up to whole vectors
    ggml_tensor *              slots  = nullptr;  // I32 [n_q]
    ggml_tensor *              cells  = nullptr;  // I32 [n]
    ggml_tensor *              mask   = nullptr;  // F32 [n, n_q]
    std::vector<ggml_tensor *> free;              // of each layer F32 [n, 1, n_head_kv]: 1 = V may change
};

// n_from: rows of the cells [0, n_from) are read. ridge is read when the graph is computed.
laq_fit_nodes laq_graph_fit(laq_compute & compute, const laq_store & store, int32_t seq_id, int64_t n_real,
                            int64_t n_from, int64_t n_q, const float * ridge);
