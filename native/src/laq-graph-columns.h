#pragma once

// K and V of all tokens of a sequence as columns: column p is the token of position p, from the archive below n_intact
// and from the cells otherwise. This is what a cache with room for all of them has, in the same order: so are results
// to the bit. A node brings the columns of one layer together on the CPU, in memory that graphs compute in.

#include "laq-archive.h"
#include "laq-store.h"

#include "ggml-backend.h"

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

// where the token of each column is
struct laq_columns {
    const laq_store & store;
    laq_archive &     archive;
    int32_t           n_intact = 0;  // of the sequence
    // [n]: the cell of a column from n_intact on, -1 = none. Below n_intact -1: the archive, or nothing
    std::vector<int32_t> cell;
    // Columns below n_intact that the archive has lost and that every head holds, ascending: cells [n_held][n_heads]
    std::vector<int32_t> held;
    std::vector<int32_t> held_cells;

    std::atomic<bool> lost = { false };  // a block was lost while columns were filled
    std::mutex        file;              // of threads that read the archive's file

    laq_columns(const laq_store & store, laq_archive & archive) : store(store), archive(archive) {}

    // look where the tokens of a sequence are; n columns
    void set(const laq_seq & seq, int32_t seq_id, int64_t n);

    // whether there is a token
    bool has(int32_t p) const;
};

// one node's part of the columns; lives as long as the graph
struct laq_columns_part {
    laq_columns & columns;
    uint32_t      ikv;
    int           part;  // 0 = K, 1 = V
};

// K or V of n columns: [n_embd_head, n_head_kv, n] in the type of the cells. cells: what the node reads, K or V of the
// layer; a.columns.set() comes before the graph is computed
ggml_tensor * laq_graph_columns(ggml_context * ctx, ggml_tensor * cells, const laq_columns_part & a, int64_t n);
