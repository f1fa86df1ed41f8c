// Compaction: what stays of a sequence moves into the first of the cells that the sequence alone owns, in place and byte
// for byte; the others become free.

#include "laq-cache.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstring>

// A tensor of the cache as lanes: what one KV head (or, where V is transposed, one channel) holds of each cell.
struct lane_layout {
    uint32_t n_lanes;
    uint32_t n_lanes_head;  // lanes of one KV head
    size_t   lane;          // bytes from one lane to the next
    size_t   cell;          // bytes from one cell to the next
    size_t   item;          // bytes of a lane in a cell
};

static lane_layout layout_of(const ggml_tensor * t, uint32_t n_head_kv, uint32_t n_embd_head, bool trans) {
    if (trans) {
        const size_t size = ggml_type_size(t->type);
        return { n_head_kv * n_embd_head, n_embd_head, t->ne[1] * size, size, size };
    }
    const size_t item = ggml_row_size(t->type, n_embd_head);
    return { n_head_kv, 1, item, t->nb[1], item };
}

// The bytes of a tensor, in place where the host sees them.
struct host_view {
    ggml_tensor *        t;
    std::vector<uint8_t> copy;
    uint8_t *            data;

    explicit host_view(ggml_tensor * t) : t(t) {
        if (ggml_backend_buffer_is_host(t->buffer)) {
            data = (uint8_t *) t->data;
            return;
        }
        copy.resize(ggml_nbytes(t));
        data = copy.data();
        ggml_backend_tensor_get(t, data, 0, copy.size());
    }

    void write() const {
        if (!copy.empty()) {
            ggml_backend_tensor_set(t, data, 0, copy.size());
        }
    }
};

using cell_list = std::vector<uint32_t>;

// dst[i] = src[i] in a lane; all are read before any is written. N: bytes of an item where the compiler is to know them
template <size_t N = 0>
static void move_items(uint8_t * lane, const lane_layout & l, const cell_list & dst, const cell_list & src,
                       uint8_t * tmp) {
    const size_t item = N ? N : l.item;
    for (size_t i = 0; i < src.size(); ++i) {
        memcpy(tmp + i * item, lane + src[i] * l.cell, item);
    }
    for (size_t i = 0; i < src.size(); ++i) {
        memcpy(lane + dst[i] * l.cell, tmp + i * item, item);
    }
}

// src: per KV head, as long as dst
static void move_lanes(ggml_tensor * t, const lane_layout & l, const cell_list & dst,
                       const std::vector<cell_list> & src) {
    const host_view      view(t);
    std::vector<uint8_t> tmp(dst.size() * l.item);

    for (uint32_t i = 0; i < l.n_lanes; ++i) {
        const cell_list & from = src[i / l.n_lanes_head];
        uint8_t *         lane = view.data + i * l.lane;
        switch (l.item) {
            case 2:  move_items<2>(lane, l, dst, from, tmp.data()); break;
            case 4:  move_items<4>(lane, l, dst, from, tmp.data()); break;
            default: move_items(lane, l, dst, from, tmp.data());
        }
    }
    view.write();
}

// src: per KV head the cells that move, in order of position
void laq_cache::move_layer(uint32_t ikv, const cell_list & dst, const std::vector<cell_list> & src) const {
    const laq_layer & layer = layers[ikv];

    ggml_tensor * k = kv->layers[ikv].k;
    ggml_tensor * v = kv->layers[ikv].v;
    move_lanes(k, layout_of(k, layer.n_head_kv, layer.n_embd_head_k, false), dst, src);
    move_lanes(v, layout_of(v, layer.n_head_kv, layer.n_embd_head_v, kv->v_trans), dst, src);
}

void laq_cache::compact(const laq_eviction & e, const cell_list & order, const std::vector<uint8_t> & own,
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

    for (uint32_t ikv = 0; ikv < layers.size(); ++ikv) {
        laq_layer &            layer = layers[ikv];
        std::vector<cell_list> src(layer.n_head_kv);
        std::vector<int32_t>   held(n_kept);
        for (uint32_t h = 0; h < layer.n_head_kv; ++h) {
            for (uint32_t i = 0; i < n_kept; ++i) {
                src[h].push_back(order[kept[ikv][h][i]]);
                held[i] = pos_at(e.seq_id, ikv, h, src[h][i]);
                pos[i]  = std::min(pos[i], held[i]);
            }
            for (uint32_t i = 0; i < n_kept; ++i) {
                layer.origin[(size_t) h * n_cells() + dst[i]] = held[i];
            }
        }
        move_layer(ikv, dst, src);
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
}
