#include "laq-graph-move.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>

//
// by the host
//

// dst[i] = src[i] in a lane; all are read before any is written. N: bytes of an item where the compiler is to know them
template <size_t N = 0>
static void move_items(uint8_t * lane, const laq_lanes & l, const std::vector<uint32_t> & dst, const uint32_t * src,
                       uint8_t * tmp) {
    const size_t item = N ? N : l.item;
    for (size_t i = 0; i < dst.size(); ++i) {
        memcpy(tmp + i * item, lane + src[i] * l.cell, item);
    }
    for (size_t i = 0; i < dst.size(); ++i) {
        memcpy(lane + dst[i] * l.cell, tmp + i * item, item);
    }
}

// src: [n_head_kv][dst.size()]
static void move_lanes(uint8_t * data, const laq_lanes & l, const std::vector<uint32_t> & dst, const uint32_t * src,
                       uint8_t * tmp) {
    for (uint32_t i = 0; i < l.n_head_kv * l.n_per_head; ++i) {
        const uint32_t * from = src + (i / l.n_per_head) * dst.size();
        uint8_t *        lane = data + i * l.lane;
        switch (l.item) {
            case 2:  move_items<2>(lane, l, dst, from, tmp); break;
            case 4:  move_items<4>(lane, l, dst, from, tmp); break;
            default: move_items(lane, l, dst, from, tmp);
        }
    }
}

// a tensor that the host does not see is copied here, and rows of one lane
laq_move_room laq_room_to_move(const laq_store & store, const laq_moves & moves) {
    size_t n_copy = 0;
    size_t n_lane = 0;
    for (uint32_t ikv = 0; ikv < store.layers.size(); ++ikv) {
        for (int part = 0; part < 2; ++part) {
            const ggml_tensor * t = store.part(ikv, part, moves.seq_id);
            n_copy                = std::max(n_copy, ggml_backend_buffer_is_host(t->buffer) ? 0 : ggml_nbytes(t));
            n_lane                = std::max(n_lane, moves.dst.size() * store.lanes(ikv, part).item);
        }
    }
    laq_fault();
    return laq_move_room(n_copy + n_lane);
}

void laq_move_by_host(const laq_store & store, const laq_moves & moves, laq_move_room & room) {
    for (uint32_t ikv = 0; ikv < store.layers.size(); ++ikv) {
        const uint32_t * src = moves.src.data() + store.layers[ikv].first_head * moves.dst.size();
        for (int part = 0; part < 2; ++part) {
            ggml_tensor *   t     = store.part(ikv, part, moves.seq_id);
            const laq_lanes lanes = store.lanes(ikv, part);
            if (ggml_backend_buffer_is_host(t->buffer)) {
                move_lanes((uint8_t *) t->data, lanes, moves.dst, src, room.data());
                continue;
            }
            ggml_backend_tensor_get(t, room.data(), 0, ggml_nbytes(t));
            move_lanes(room.data(), lanes, moves.dst, src, room.data() + ggml_nbytes(t));
            ggml_backend_tensor_set(t, room.data(), 0, ggml_nbytes(t));
        }
    }
}

//
// by a graph
//

// A view of the same bytes in another type and shape. ggml_view_3d() would keep the type.
static ggml_tensor * view_as(ggml_context * ctx, ggml_tensor * t, ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2,
                             size_t nb1, size_t nb2) {
    ggml_tensor * v = ggml_view_1d(ctx, t, ggml_blck_size(t->type), 0);

    v->type  = type;
    v->ne[0] = ne0;
    v->ne[1] = ne1;
    v->ne[2] = ne2;
    v->nb[0] = ggml_type_size(type);
    v->nb[1] = nb1;
    v->nb[2] = nb2;
    v->nb[3] = nb2 * ne2;
    return v;
}

// A tensor of rows as 32-bit words [n_words, n_rows, n_head], which existing operations move whatever the type is.
static ggml_tensor * words_of(ggml_context * ctx, ggml_tensor * t, int64_t n_rows, int64_t n_head, size_t head) {
    return view_as(ctx, t, GGML_TYPE_I32, head / sizeof(int32_t), n_rows, n_head, t->nb[1], head);
}

// rows are cells, each with one head after the other
static void move_rows(laq_compute & compute, ggml_tensor * t, ggml_tensor * index, size_t head) {
    ggml_context * ctx = compute.ctx();
    ggml_tensor *  all = words_of(ctx, t, t->ne[1], index->ne[1], head);
    ggml_tensor *  tmp = ggml_get_rows(ctx, all, index);
    compute.add(tmp, t);
    compute.add(ggml_cpy(ctx, tmp, words_of(ctx, t, index->ne[0], index->ne[1], head)), t);
}

// rows are channels: turned to rows of cells, moved, and turned back
static void move_columns(laq_compute & compute, ggml_tensor * v, ggml_tensor * index, int64_t n_embd_head,
                         int64_t n_from) {
    ggml_context * ctx    = compute.ctx();
    const int64_t  n      = index->ne[0];
    const int64_t  n_head = index->ne[1];
    const size_t   size   = ggml_type_size(v->type);
    const size_t   row    = v->ne[1] * size;  // all cells of a channel

    ggml_tensor * chan  = ggml_view_2d(ctx, v, n_from, n_embd_head * n_head, row, 0);
    ggml_tensor * cells = ggml_cont(ctx, ggml_transpose(ctx, chan));
    compute.add(cells, v);
    ggml_tensor * tmp = ggml_get_rows(ctx, words_of(ctx, cells, n_from, n_head, n_embd_head * size), index);
    compute.add(tmp, v);
    ggml_tensor * back = view_as(ctx, tmp, v->type, n_embd_head, n, n_head, n_embd_head * size, n_embd_head * size * n);
    ggml_tensor * dst  = ggml_view_3d(ctx, v, n, n_embd_head, n_head, row, n_embd_head * row, 0);
    compute.add(ggml_cpy(ctx, back, ggml_permute(ctx, dst, 1, 0, 2, 3)), v);
}

static ggml_tensor * move_layer(laq_compute & compute, const laq_store & store, int32_t seq_id, uint32_t ikv, int64_t n,
                                int64_t n_from) {
    const laq_layer & layer = store.layers[ikv];
    ggml_tensor *     k     = store.k(ikv, seq_id);
    ggml_tensor *     v     = store.v(ikv, seq_id);
    ggml_tensor *     index = ggml_new_tensor_2d(compute.ctx(), GGML_TYPE_I32, n, layer.n_head_kv);
    ggml_set_input(index);

    move_rows(compute, k, index, ggml_row_size(k->type, layer.n_embd_head_k));
    if (store.v_trans()) {
        move_columns(compute, v, index, layer.n_embd_head_v, n_from);
    } else {
        move_rows(compute, v, index, ggml_row_size(v->type, layer.n_embd_head_v));
    }
    return index;
}

std::vector<ggml_tensor *> laq_graph_moves(laq_compute & compute, const laq_store & store, int32_t seq_id, int64_t n,
                                           int64_t n_from) {
    std::vector<ggml_tensor *> res;
    for (uint32_t ikv = 0; ikv < store.layers.size(); ++ikv) {
        res.push_back(move_layer(compute, store, seq_id, ikv, n, n_from));
    }
    return res;
}

// whether every head of a layer is whole words, K and V are on one device, and it has all operations
static bool can_move(laq_compute & compute, const laq_store & store, uint32_t ikv) {
    const ggml_backend_dev_t dev = laq_device_of(store.k(ikv, 0)->buffer);
    if (!dev || dev != laq_device_of(store.v(ikv, 0)->buffer)) {
        return false;
    }
    for (int part = 0; part < 2; ++part) {
        const ggml_type type = store.part(ikv, part, 0)->type;
        if (ggml_row_size(type, store.layers[ikv].n_embd_head(part)) % sizeof(int32_t) != 0) {
            return false;
        }
    }
    compute.begin();
    move_layer(compute, store, 0, ikv, store.n_cells(), store.n_cells());
    for (int i = 0; i < ggml_graph_n_nodes(compute.graph()); ++i) {
        if (!ggml_backend_dev_supports_op(dev, ggml_graph_node(compute.graph(), i))) {
            return false;
        }
    }
    return true;
}

bool laq_moves_by_graph(laq_compute & compute, const laq_store & store) {
    const char * asked = getenv("LAQ_COMPACT");
    if ((asked && strcmp(asked, "graph") != 0) || (!asked && store.in_host_memory())) {
        return false;
    }
    for (uint32_t ikv = 0; ikv < store.layers.size(); ++ikv) {
        if (!can_move(compute, store, ikv)) {
            return false;
        }
    }
    return true;
}

std::vector<int32_t> laq_move_index(const laq_store & store, const laq_moves & moves, uint32_t ikv, int64_t n) {
    const laq_layer &    layer = store.layers[ikv];
    std::vector<int32_t> res(n * layer.n_head_kv);
    for (uint32_t h = 0; h < layer.n_head_kv; ++h) {
        int32_t *        row = res.data() + h * n;
        const uint32_t * src = moves.src.data() + (layer.first_head + h) * moves.dst.size();
        std::iota(row, row + n, 0);
        for (size_t i = 0; i < moves.dst.size(); ++i) {
            row[moves.dst[i]] = (int32_t) src[i];
        }
    }
    return res;
}
