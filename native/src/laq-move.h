#pragma once

#include "laq.h"

#include "ggml-backend.h"

#include <cstdint>
#include <vector>

struct laq_cache;

// Cells that move: src [n_layer][n_head_kv][dst.size()], in order of position; dst ascending.
struct laq_moves {
    std::vector<uint32_t>                           dst;
    std::vector<std::vector<std::vector<uint32_t>>> src;
};

// Whether K and V of every layer can be moved by a graph where they are. The host moves them otherwise, and where it sees
// them anyway. env: LAQ_COMPACT = graph | host, for tests
bool laq_moves_by_graph(const laq_cache & laq);

// let the scheduler plan for the largest graph
void laq_graph_reserve_moves(laq_cache & laq);

// Move the cells of all layers, byte for byte. By a graph indices alone travel. Throws laq_error.
void laq_move(laq_cache & laq, const laq_moves & moves);
