#pragma once

#include "laq.h"

#include "ggml-backend.h"

#include <cstdint>
#include <string>
#include <vector>

struct laq_cache;

// Cells that move: src [n_layer][n_head_kv][dst.size()], in order of position; dst ascending.
struct laq_moves {
    std::vector<uint32_t>                           dst;
    std::vector<std::vector<std::vector<uint32_t>>> src;
};

// Whether a graph moves K and V of every layer where they are, and why. The host moves them otherwise, and where it sees
// them anyway. env: LAQ_COMPACT = graph | host, for tests
struct laq_mover_choice {
    bool        by_graph;
    std::string reason;
};

laq_mover_choice laq_choose_mover(const laq_cache & laq);

// let the scheduler plan for the largest graph
void laq_graph_reserve_moves(laq_cache & laq);

// Move the cells of all layers, byte for byte. By a graph indices alone travel. Throws laq_error.
void laq_move(laq_cache & laq, const laq_moves & moves);
