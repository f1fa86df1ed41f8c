// Compaction: what stays of a sequence moves into the first of the cells that the sequence alone owns, in place and byte
// for byte; the others become free.

#include "laq-cache.h"
#include "laq-move.h"

#include <algorithm>

using cell_list = std::vector<uint32_t>;

// the cells that n tokens come to: the first of those that the sequence gives up, and empty ones where more come back
static cell_list places(const llama_kv_cells & table, const cell_list & freed, uint32_t n) {
    cell_list dst = freed;
    for (uint32_t i = 0; i < table.size() && dst.size() < n; ++i) {
        if (table.is_empty(i)) {
            dst.push_back(i);
        }
    }
    std::sort(dst.begin(), dst.end());
    dst.resize(n);
    return dst;
}

cell_list laq_cache::compact(const laq_eviction & e, const cell_list & order, const std::vector<uint8_t> & own,
                             const laq_rows & rows) {
    llama_kv_cells & table  = kv->v_cells[0];
    const uint32_t   n_kept = rows[0][0].size();

    cell_list freed;
    for (size_t i = 0; i < order.size(); ++i) {
        if (own[i]) {
            freed.push_back(order[i]);
        }
    }
    const cell_list dst = places(table, freed, n_kept);

    // Positions for the mask: below n_intact any will do that ascend and are unique, so the lowest of all heads.
    std::vector<int32_t>           pos(n_kept, INT32_MAX);
    std::vector<llama_kv_cell_ext> ext(n_kept);
    uint32_t                       n_mixed = 0;

    laq_moves moves = { dst, {} };
    for (uint32_t ikv = 0; ikv < layers.size(); ++ikv) {
        std::vector<cell_list> & src = moves.src.emplace_back(layers[ikv].n_head_kv);
        for (uint32_t h = 0; h < src.size(); ++h) {
            for (uint32_t i = 0; i < n_kept; ++i) {
                const int32_t cell = rows[ikv][h][i].cell;
                src[h].push_back(cell < 0 ? dst[i] : cell);
            }
        }
    }
    laq_move(*this, moves);

    for (uint32_t ikv = 0; ikv < layers.size(); ++ikv) {
        for (uint32_t h = 0; h < layers[ikv].n_head_kv; ++h) {
            for (uint32_t i = 0; i < n_kept; ++i) {
                const int32_t held = rows[ikv][h][i].pos;

                layers[ikv].origin[(size_t) h * n_cells() + dst[i]] = held;

                pos[i] = std::min(pos[i], held);
            }
        }
    }
    for (uint32_t i = 0; i < n_kept; ++i) {
        const int32_t cell = rows[0][0][i].cell;
        ext[i]             = cell < 0 ? llama_kv_cell_ext() : table.ext_get(cell);
        n_mixed += pos[i] < e.n_intact;
    }
    if (n_mixed > 0) {
        // the next token after a removal of everything from n_intact on must have position n_intact
        pos[n_mixed - 1] = e.n_intact - 1;
    }
    for (const uint32_t cell : freed) {
        table.rm(cell);
    }
    for (uint32_t i = 0; i < n_kept; ++i) {
        table.pos_set(dst[i], pos[i]);
        table.ext_set(dst[i], ext[i]);
        table.seq_add(dst[i], e.seq_id);
    }
    // the search for free cells begins behind what was kept
    kv->v_heads[0] = seqs.size() == 1 ? n_kept : 0;
    return dst;
}
