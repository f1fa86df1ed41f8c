// Compaction: what stays of a sequence moves into the first of the cells that the sequence alone owns, in place and byte
// for byte; the others become free.

#include "laq-cache.h"
#include "laq-move.h"
#include "laq-threads.h"

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

// what comes back from the archive has no cell: whatever is there stays until it is written
static laq_moves moves_of(const laq_cache & laq, const laq_rows & rows, const cell_list & dst) {
    laq_moves res = { dst, std::vector<std::vector<cell_list>>(rows.size()) };
    laq_parallel(rows.size(), laq.n_head_kv_max() * dst.size(), laq.n_threads(), [&](uint32_t ikv) {
        res.src[ikv].resize(rows[ikv].size(), cell_list(dst.size()));
        for (uint32_t h = 0; h < rows[ikv].size(); ++h) {
            std::transform(rows[ikv][h].begin(), rows[ikv][h].end(), dst.begin(), res.src[ikv][h].begin(),
                           [](const laq_row & row, uint32_t to) { return row.cell < 0 ? to : (uint32_t) row.cell; });
        }
    });
    return res;
}

// Note what each head holds now. Returns positions for the mask: below n_intact any will do that ascend and are unique, so
// the lowest of all heads.
static std::vector<int32_t> settle_origins(laq_cache & laq, const laq_rows & rows, const cell_list & dst) {
    std::vector<std::vector<int32_t>> lowest(rows.size(), std::vector<int32_t>(dst.size(), INT32_MAX));
    laq_parallel(rows.size(), laq.n_head_kv_max() * dst.size(), laq.n_threads(), [&](uint32_t ikv) {
        for (uint32_t h = 0; h < rows[ikv].size(); ++h) {
            for (uint32_t i = 0; i < dst.size(); ++i) {
                const int32_t held = rows[ikv][h][i].pos;

                laq.layers[ikv].origin[(size_t) h * laq.n_cells() + dst[i]] = held;

                lowest[ikv][i] = std::min(lowest[ikv][i], held);
            }
        }
    });
    std::vector<int32_t> res(dst.size(), INT32_MAX);
    for (const std::vector<int32_t> & of_layer : lowest) {
        std::transform(res.begin(), res.end(), of_layer.begin(), res.begin(),
                       [](int32_t a, int32_t b) { return std::min(a, b); });
    }
    return res;
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

    laq_move(*this, moves_of(*this, rows, dst));

    std::vector<int32_t>           pos = settle_origins(*this, rows, dst);
    std::vector<llama_kv_cell_ext> ext(n_kept);
    uint32_t                       n_mixed = 0;
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
