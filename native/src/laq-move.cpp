// Moving what stays of K and V, in place and byte for byte: by the host, or by a graph on the device that holds them.

#include "laq-move.h"

#include "laq-cache.h"
#include "laq-graph.h"

#include "ggml-backend.h"
#include "llama-graph.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>

//
// by the host
//

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

static void move_by_host(const laq_cache & laq, const laq_moves & moves) {
    for (uint32_t ikv = 0; ikv < laq.layers.size(); ++ikv) {
        const laq_layer & layer = laq.layers[ikv];

        ggml_tensor * k = laq.k(ikv);
        ggml_tensor * v = laq.v(ikv);
        move_lanes(k, layout_of(k, layer.n_head_kv, layer.n_embd_head_k, false), moves.dst, moves.src[ikv]);
        move_lanes(v, layout_of(v, layer.n_head_kv, layer.n_embd_head_v, laq.v_trans()), moves.dst, moves.src[ikv]);
    }
}

//
// by rows
//

uint8_t * laq_host_buffer::get(ggml_backend_dev_t dev, size_t size) {
    ggml_backend_buffer_type_t wanted = dev ? ggml_backend_dev_host_buffer_type(dev) : nullptr;

    wanted = wanted ? wanted : ggml_backend_cpu_buffer_type();
    if (!buf || type != wanted || ggml_backend_buffer_get_size(buf.get()) < size) {
        buf.reset();
        buf.reset(ggml_backend_buft_alloc_buffer(wanted, size));
        type = wanted;
    }
    if (!buf) {
        throw laq_error(LAQ_STATUS_NO_MEMORY, "no host memory for what is fetched from the cache");
    }
    return (uint8_t *) ggml_backend_buffer_get_base(buf.get());
}

laq_cell_rows::laq_cell_rows(const laq_cache & laq, uint32_t ikv, bool is_v, uint32_t first, uint32_t last,
                             laq_host_buffer & fetched) : t(is_v ? laq.v(ikv) : laq.k(ikv)) {
    const laq_layer & layer = laq.layers[ikv];
    const uint32_t    n     = is_v ? layer.n_embd_head_v : layer.n_embd_head_k;
    const lane_layout l     = layout_of(t, layer.n_head_kv, n, is_v && laq.v_trans());

    n_lanes = l.n_lanes_head;
    n_row   = l.item * l.n_lanes_head;
    lane    = l.lane;
    cell    = l.cell;
    item    = l.item;
    if (ggml_backend_buffer_is_host(t->buffer)) {
        data          = (uint8_t *) t->data;
        n_transferred = 0;
        return;
    }
    const bool whole = n_lanes > 1;
    offset           = whole ? 0 : first * t->nb[1];
    n_transferred    = whole ? ggml_nbytes(t) : (last - first) * t->nb[1];
    data             = fetched.get(laq_device_of(t->buffer), ggml_nbytes(t)) - offset;
    ggml_backend_tensor_get(t, data + offset, offset, n_transferred);
}

void laq_cell_rows::get(uint32_t head, const std::vector<uint32_t> & cells, uint8_t * dst) const {
    for (uint32_t i = 0; i < n_lanes; ++i) {
        const uint8_t * src = data + (head * n_lanes + i) * lane;
        for (size_t c = 0; c < cells.size(); ++c) {
            memcpy(dst + c * n_row + i * item, src + cells[c] * cell, item);
        }
    }
}

void laq_cell_rows::set(uint32_t head, const std::vector<uint32_t> & cells, const uint8_t * src) {
    for (uint32_t i = 0; i < n_lanes; ++i) {
        uint8_t * dst = data + (head * n_lanes + i) * lane;
        for (size_t c = 0; c < cells.size(); ++c) {
            memcpy(dst + cells[c] * cell, src + c * n_row + i * item, item);
        }
    }
}

const uint8_t * laq_cell_rows::row(uint32_t head, uint32_t c, uint8_t * turned) const {
    const uint8_t * src = data + head * n_lanes * lane + c * cell;
    if (n_lanes == 1) {
        return src;
    }
    for (uint32_t i = 0; i < n_lanes; ++i) {
        memcpy(turned + i * item, src + i * lane, item);
    }
    return turned;
}

void laq_cell_rows::write() const {
    if (n_transferred > 0) {
        ggml_backend_tensor_set(t, data + offset, offset, n_transferred);
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

// graph of one or all layers; idx: I32 [n, n_head_kv], the cell whose content comes to each of the first n cells
struct move_graph {
    ggml_context *             ctx;
    ggml_cgraph *              gf;
    ggml_backend_sched_t       sched;  // nullptr: only looked at
    std::vector<ggml_tensor *> idx;    // per KV layer

    void add(ggml_tensor * node, const ggml_tensor * beside) const {
        if (sched) {
            laq_graph_place(sched, node, beside);
        }
        ggml_build_forward_expand(gf, node);
    }

    // rows are cells, each with one head after the other
    void move_rows(ggml_tensor * t, ggml_tensor * index, size_t head) const {
        ggml_tensor * all = words_of(ctx, t, t->ne[1], index->ne[1], head);
        ggml_tensor * tmp = ggml_get_rows(ctx, all, index);
        add(tmp, t);
        add(ggml_cpy(ctx, tmp, words_of(ctx, t, index->ne[0], index->ne[1], head)), t);
    }

    // rows are channels: turned to rows of cells, moved, and turned back
    void move_columns(ggml_tensor * v, ggml_tensor * index, int64_t n_embd_head, int64_t n_from) const {
        const int64_t n      = index->ne[0];
        const int64_t n_head = index->ne[1];
        const size_t  size   = ggml_type_size(v->type);
        const size_t  row    = v->ne[1] * size;  // all cells of a channel

        ggml_tensor * chan  = ggml_view_2d(ctx, v, n_from, n_embd_head * n_head, row, 0);
        ggml_tensor * cells = ggml_cont(ctx, ggml_transpose(ctx, chan));
        add(cells, v);
        ggml_tensor * tmp = ggml_get_rows(ctx, words_of(ctx, cells, n_from, n_head, n_embd_head * size), index);
        add(tmp, v);
        ggml_tensor * back =
            view_as(ctx, tmp, v->type, n_embd_head, n, n_head, n_embd_head * size, n_embd_head * size * n);
        ggml_tensor * dst = ggml_view_3d(ctx, v, n, n_embd_head, n_head, row, n_embd_head * row, 0);
        add(ggml_cpy(ctx, back, ggml_permute(ctx, dst, 1, 0, 2, 3)), v);
    }
};

static void add_layer(move_graph & mg, const laq_cache & laq, uint32_t ikv, int64_t n, int64_t n_from) {
    const laq_layer & layer = laq.layers[ikv];

    ggml_tensor * k   = laq.k(ikv);
    ggml_tensor * v   = laq.v(ikv);
    ggml_tensor * idx = ggml_new_tensor_2d(mg.ctx, GGML_TYPE_I32, n, layer.n_head_kv);
    ggml_set_input(idx);
    mg.idx.push_back(idx);

    mg.move_rows(k, idx, ggml_row_size(k->type, layer.n_embd_head_k));
    if (laq.v_trans()) {
        mg.move_columns(v, idx, layer.n_embd_head_v, n_from);
    } else {
        mg.move_rows(v, idx, ggml_row_size(v->type, layer.n_embd_head_v));
    }
}

// "" if every operation of the layer's graph runs on the device of its K and V, and heads are whole words
static std::string obstacle(const laq_cache & laq, uint32_t ikv) {
    const laq_layer &   layer = laq.layers[ikv];
    const ggml_tensor * k     = laq.k(ikv);
    const ggml_tensor * v     = laq.v(ikv);

    if (ggml_row_size(k->type, layer.n_embd_head_k) % sizeof(int32_t) != 0 ||
        ggml_row_size(v->type, layer.n_embd_head_v) % sizeof(int32_t) != 0) {
        return "a head of K or V is no whole number of 32-bit words";
    }
    const ggml_backend_dev_t dev = laq_device_of(k->buffer);
    if (!dev || dev != laq_device_of(v->buffer)) {
        return "K and V of a layer are not on one device";
    }
    constexpr size_t n_max = 64;
    ggml_context_ptr ctx(
        ggml_init({ n_max * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_max, false), nullptr, true }));

    move_graph mg = { ctx.get(), ggml_new_graph_custom(ctx.get(), n_max, false), nullptr, {} };
    add_layer(mg, laq, ikv, laq.n_cells(), laq.n_cells());
    for (int i = 0; i < ggml_graph_n_nodes(mg.gf); ++i) {
        const ggml_tensor * node = ggml_graph_node(mg.gf, i);
        if (!ggml_backend_dev_supports_op(dev, node)) {
            return std::string(ggml_backend_dev_name(dev)) + " has no " + ggml_op_desc(node) + " for this";
        }
    }
    return "";
}

laq_mover_choice laq_choose_mover(const laq_cache & laq) {
    const char * asked = getenv("LAQ_COMPACT");
    if (asked && strcmp(asked, "graph") != 0) {
        return { false, std::string("LAQ_COMPACT = ") + asked };
    }
    for (uint32_t ikv = 0; ikv < laq.layers.size(); ++ikv) {
        if (!asked && ggml_backend_buffer_is_host(laq.k(ikv)->buffer)) {
            return { false, "the host sees K and V" };
        }
        const std::string why_not = obstacle(laq, ikv);
        if (!why_not.empty()) {
            return { false, why_not };
        }
    }
    return { true, asked ? "LAQ_COMPACT = graph" : "the device has the operations" };
}

static move_graph build_move_graph(const laq_cache & laq, llm_graph_result & res, int64_t n, int64_t n_from) {
    res.reset();
    move_graph mg = { res.get_ctx(), res.get_gf(), laq.ctx->get_sched(), {} };
    ggml_backend_sched_reset(mg.sched);
    for (uint32_t ikv = 0; ikv < laq.layers.size(); ++ikv) {
        add_layer(mg, laq, ikv, n, n_from);
    }
    return mg;
}

void laq_graph_reserve_moves(laq_cache & laq) {
    llm_graph_result * res = laq.ctx->get_gf_res_reserve();
    const move_graph   mg  = build_move_graph(laq, *res, laq.n_cells(), laq.n_cells());
    if (!ggml_backend_sched_reserve(mg.sched, mg.gf)) {
        throw laq_error(LAQ_STATUS_NO_MEMORY, "no memory for the graph that moves K and V: use a smaller kv_staging");
    }
    res->reset();
}

// cells of the first ones that are no destination, of other sequences, stay where they are
static std::vector<int32_t> index_of(const cell_list & dst, const std::vector<cell_list> & src, int64_t n) {
    std::vector<int32_t> res(n * src.size());
    for (size_t h = 0; h < src.size(); ++h) {
        int32_t * row = res.data() + h * n;
        std::iota(row, row + n, 0);
        for (size_t i = 0; i < dst.size(); ++i) {
            row[dst[i]] = src[h][i];
        }
    }
    return res;
}

static void move_by_graph(laq_cache & laq, const laq_moves & moves) {
    const int64_t      n   = moves.dst.back() + 1;
    llm_graph_result * res = laq.ctx->get_gf_res_reserve();
    const move_graph   mg  = build_move_graph(laq, *res, n, std::max<int64_t>(n, laq.cells().used_max_p1()));
    if (!ggml_backend_sched_alloc_graph(mg.sched, mg.gf)) {
        throw laq_error(LAQ_STATUS_NO_MEMORY, "no memory for the graph that moves K and V");
    }
    for (uint32_t ikv = 0; ikv < laq.layers.size(); ++ikv) {
        const std::vector<int32_t> index = index_of(moves.dst, moves.src[ikv], n);
        ggml_backend_tensor_set(mg.idx[ikv], index.data(), 0, ggml_nbytes(mg.idx[ikv]));
    }
    if (laq.ctx->graph_compute(mg.gf, true) != GGML_STATUS_SUCCESS) {
        throw laq_error(LAQ_STATUS_INTERNAL, "the graph that moves K and V failed: the cache is damaged, clear it");
    }
    ggml_backend_sched_synchronize(mg.sched);
}

void laq_move(laq_cache & laq, const laq_moves & moves) {
    if (moves.dst.empty()) {
        return;
    }
    if (laq.by_graph) {
        move_by_graph(laq, moves);
    } else {
        move_by_host(laq, moves);
    }
}
