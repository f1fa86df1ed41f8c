// Compaction: what stays of a sequence moves into the first of the cells that the sequence alone owns, in place and byte
// for byte; the others become free.

#include "laq-cache.h"
#include "laq-move.h"

#include <algorithm>

using cell_list = std::vector<uint32_t>;

cell_list laq_cache::compact(const laq_eviction & e, const cell_list & order, const std::vector<uint8_t> & own,
                             const laq_kept & kept) {
    llama_kv_cells & table  = kv->v_cells[0];
    const uint32_t   n_kept = kept[0][0].size();

    cell_list freed;
    for (size_t i = 0; i < order.size(); ++i) {
        if (own[i]) {
            freed.push_back(order[i]);
        }
    }
    cell_list dst = freed;
    std::sort(dst.begin(), dst.end());
    dst.resize(n_kept);

    // Positions for the mask: below n_intact any will do that ascend and are unique, so the lowest of all heads.
    std::vector<int32_t>           pos(n_kept, INT32_MAX);
    std::vector<llama_kv_cell_ext> ext(n_kept);
    uint32_t                       n_mixed = 0;
    std::vector<int32_t>           held(n_kept);

    laq_moves moves = { dst, {} };
    for (uint32_t ikv = 0; ikv < layers.size(); ++ikv) {
        std::vector<cell_list> & src = moves.src.emplace_back(layers[ikv].n_head_kv);
        for (uint32_t h = 0; h < src.size(); ++h) {
            for (uint32_t i = 0; i < n_kept; ++i) {
                src[h].push_back(order[kept[ikv][h][i]]);
            }
        }
    }
    laq_move(*this, moves);

    for (uint32_t ikv = 0; ikv < layers.size(); ++ikv) {
        for (uint32_t h = 0; h < layers[ikv].n_head_kv; ++h) {
            for (uint32_t i = 0; i < n_kept; ++i) {
                held[i] = pos_at(e.seq_id, ikv, h, moves.src[ikv][h][i]);
                pos[i]  = std::min(pos[i], held[i]);
            }
            for (uint32_t i = 0; i < n_kept; ++i) {
                layers[ikv].origin[(size_t) h * n_cells() + dst[i]] = held[i];
            }
        }
    }
    for (uint32_t i = 0; i < n_kept; ++i) {
        ext[i] = table.ext_get(order[kept[0][0][i]]);
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
