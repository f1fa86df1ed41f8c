#pragma once

// Moving rows of K and V in place and byte for byte: by a graph on the device that holds them, or by the host.

#include "laq-compute.h"
#include "laq-store.h"

#include <cstdint>
#include <string>
#include <vector>

// Rows that move in the stream of a sequence: to the cells dst, ascending, from the cells src [n_heads][dst.size()]. A
// row that comes from elsewhere moves to where it is.
struct laq_moves {
    int32_t               seq_id;
    std::vector<uint32_t> dst;
    std::vector<uint32_t> src;
};

// Whether a graph moves the rows of every layer where they are. The host does otherwise, and where it sees them anyway.
// env: LAQ_COMPACT = graph | host, for tests
bool laq_moves_by_graph(laq_compute & compute, const laq_store & store);

// Nodes for the cells [0, n) of all layers, of which the rows of cells [0, n_from) are sources. Returns the input of
// each layer: I32 [n, n_head_kv], the cell whose row comes to each cell
std::vector<ggml_tensor *> laq_graph_moves(laq_compute & compute, const laq_store & store, int32_t seq_id, int64_t n,
                                           int64_t n_from);

// the cell whose row comes to each of the first n cells of the heads of a layer: [n_head_kv][n]
std::vector<int32_t> laq_move_index(const laq_store & store, const laq_moves & moves, uint32_t ikv, int64_t n);

// Room for the rows of one layer and part on their way: what the host moves with.
using laq_move_room = std::vector<uint8_t>;

laq_move_room laq_room_to_move(const laq_store & store, const laq_moves & moves);

// Move all rows by the host. Nothing fails.
void laq_move_by_host(const laq_store & store, const laq_moves & moves, laq_move_room & room);
