#include "laq-cache.h"

#include "ggml-backend.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

static constexpr uint32_t N_CELLS_STEP = 256;  // llama_kv_cache::get_n_kv pads to this

uint32_t laq_pad_cells(uint32_t n_tokens, uint32_t n_cells_max) {
    return std::min(n_cells_max, std::max(N_CELLS_STEP, GGML_PAD(n_tokens, N_CELLS_STEP)));
}

//
// construction
//

laq_cache::laq_cache(llama_context * ctx, const laq_params & p) :
    ctx(ctx), kv(dynamic_cast<llama_kv_cache *>(ctx->get_memory())), params(p), pinned(p.pinned, p.pinned + p.n_pinned),
    debug(getenv("LAQ_DEBUG") != nullptr) {
    params.pinned = pinned.data();

    n_ring      = std::max(params.n_window, params.n_window_snapkv) + params.n_lookahead;
    n_cells_max = kv->get_size();

    init_layers();
    init_ring();

    stats.kv_bytes_full = kv_bytes();

    // the cells that the context was made with are empty: give them back until they are needed
    if (n_resident() == 0) {
        rebuild(laq_pad_cells(1, n_cells_max), {}, 0);
    }
    stats.n_resizes = 0;

    kv->laq = this;
    ctx->set_laq(this);
}

laq_cache::~laq_cache() {
    kv->laq = nullptr;
    ctx->set_laq(nullptr);
}

void laq_cache::check_layers(const llama_context & ctx) {
    const auto * kv = static_cast<const llama_kv_cache *>(ctx.get_memory());

    if (kv->other || kv->layers.size() != kv->map_layer_ids.size()) {
        throw laq_error(LAQ_STATUS_UNSUPPORTED, "layers of this model share their KV cache; unset kv_budget");
    }
    for (const auto & layer : kv->layers) {
        if (!layer.k || !layer.v) {
            throw laq_error(LAQ_STATUS_UNSUPPORTED, "a layer of this model caches only K; unset kv_budget");
        }
    }
}

void laq_cache::init_layers() {
    const llama_hparams & hparams = ctx->get_model().hparams;

    for (const auto & src : kv->layers) {
        laq_layer layer;
        layer.il            = (int32_t) src.il;
        layer.n_head        = hparams.n_head(src.il);
        layer.n_head_kv     = hparams.n_head_kv(src.il);
        layer.n_embd_head_k = hparams.n_embd_head_k(src.il);
        layer.n_embd_head_v = hparams.n_embd_head_v(src.il);
        layer.softcap       = hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f;
        layers.push_back(layer);
    }
}

void laq_cache::init_ring() {
    for (const auto & [_, buf] : kv->ctxs_bufs) {
        const ggml_init_params ip = { layers.size() * ggml_tensor_overhead(), nullptr, true };

        ggml_context_ptr rctx(ggml_init(ip));
        for (uint32_t ikv = 0; ikv < layers.size(); ++ikv) {
            laq_layer & layer = layers[ikv];
            if (k(ikv)->buffer != buf.get()) {
                continue;
            }
            layer.ring = ggml_new_tensor_2d(rctx.get(), GGML_TYPE_F32, layer.n_embd_head_k * layer.n_head, n_ring);
            ggml_format_name(layer.ring, "laq_ring_l%d", layer.il);
        }
        if (!ggml_get_first_tensor(rctx.get())) {
            continue;
        }
        ggml_backend_buffer_ptr rbuf(
            ggml_backend_alloc_ctx_tensors_from_buft(rctx.get(), ggml_backend_buffer_get_type(buf.get())));
        if (!rbuf) {
            throw laq_error(LAQ_STATUS_NO_MEMORY, "no memory for the ring of queries: use a smaller window_size");
        }
        ggml_backend_buffer_clear(rbuf.get(), 0);
        ring_bufs.emplace_back(std::move(rctx), std::move(rbuf));
    }
    ring_pos.assign(n_ring, -1);
}

//
// what is there
//

const llama_kv_cells & laq_cache::cells() const {
    return kv->v_cells[0];
}

ggml_tensor * laq_cache::k(uint32_t ikv) const {
    return kv->layers[ikv].k;
}

uint32_t laq_cache::n_head_kv_max() const {
    uint32_t res = 0;
    for (const laq_layer & layer : layers) {
        res = std::max(res, layer.n_head_kv);
    }
    return res;
}

uint32_t laq_cache::n_cells() const {
    return cells().size();
}

uint32_t laq_cache::n_resident() const {
    return cells().get_used();
}

int32_t laq_cache::n_tokens() const {
    return cells().seq_pos_max(0) + 1;
}

std::vector<uint32_t> laq_cache::resident() const {
    std::vector<uint32_t> res;
    res.reserve(n_resident());
    for (uint32_t i = 0; i < cells().used_max_p1(); ++i) {
        if (!cells().is_empty(i)) {
            res.push_back(i);
        }
    }
    const auto before = [&](uint32_t a, uint32_t b) { return cells().pos_get(a) < cells().pos_get(b); };
    if (!std::is_sorted(res.begin(), res.end(), before)) {
        std::sort(res.begin(), res.end(), before);
    }
    return res;
}

int32_t laq_cache::pos_at(uint32_t ikv, uint32_t h, uint32_t cell) const {
    return cell < origin.n_mixed ? origin.pos[ikv][h * origin.n_mixed + cell] : cells().pos_get(cell);
}

static uint64_t bytes_of(const laq_buffers & bufs) {
    uint64_t res = 0;
    for (const auto & [_, buf] : bufs) {
        res += ggml_backend_buffer_get_size(buf.get());
    }
    return res;
}

uint64_t laq_cache::kv_bytes() const {
    return bytes_of(kv->ctxs_bufs);
}

uint64_t laq_cache::ring_bytes() const {
    return bytes_of(ring_bufs);
}

//
// moving tokens
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

    host_view(ggml_tensor * t, bool read) : t(t) {
        if (ggml_backend_buffer_is_host(t->buffer)) {
            data = (uint8_t *) t->data;
            return;
        }
        copy.resize(ggml_nbytes(t));
        data = copy.data();
        if (read) {
            ggml_backend_tensor_get(t, data, 0, copy.size());
        }
    }

    void write() const {
        if (!copy.empty()) {
            ggml_backend_tensor_set(t, data, 0, copy.size());
        }
    }
};

// dst cell i = src cell order[kept[i]], lane by lane; runs of neighbours are copied at once where a lane is dense
static void move_lanes(ggml_tensor * tsrc, ggml_tensor * tdst, const lane_layout & lsrc, const lane_layout & ldst,
                       const std::vector<uint32_t> & order, const std::vector<std::vector<uint32_t>> * kept) {
    const host_view src(tsrc, true);
    const host_view dst(tdst, false);

    for (uint32_t l = 0; l < lsrc.n_lanes; ++l) {
        const std::vector<uint32_t> * sel = kept ? &(*kept)[l / lsrc.n_lanes_head] : nullptr;

        const size_t n  = sel ? sel->size() : order.size();
        const auto   at = [&](size_t i) { return order[sel ? (*sel)[i] : i]; };

        for (size_t i = 0, run; i < n; i += run) {
            run = 1;
            if (lsrc.cell == lsrc.item && ldst.cell == ldst.item) {
                while (i + run < n && at(i + run) == at(i) + run) {
                    ++run;
                }
            }
            memcpy(dst.data + l * ldst.lane + i * ldst.cell, src.data + l * lsrc.lane + at(i) * lsrc.cell,
                   run * lsrc.item);
        }
    }
    dst.write();
}

void laq_cache::move_layer(uint32_t ikv, const laq_storage & dst, const std::vector<uint32_t> & order,
                           const laq_kept & kept) const {
    const laq_layer & layer = layers[ikv];
    const auto *      sel   = kept.empty() ? nullptr : &kept[ikv];

    const auto move = [&](ggml_tensor * src, ggml_tensor * out, uint32_t n_embd_head, bool trans) {
        lane_layout lsrc = layout_of(src, layer.n_head_kv, n_embd_head, trans);
        lane_layout ldst = layout_of(out, layer.n_head_kv, n_embd_head, trans);
        if (!sel && !trans) {
            // all heads move alike: a cell is one lane
            lsrc = { 1, 1, 0, src->nb[1], src->nb[1] };
            ldst = { 1, 1, 0, out->nb[1], out->nb[1] };
        }
        move_lanes(src, out, lsrc, ldst, order, sel);
    };
    move(kv->layers[ikv].k, dst.layers[ikv].k, layer.n_embd_head_k, false);
    move(kv->layers[ikv].v, dst.layers[ikv].v, layer.n_embd_head_v, kv->v_trans);
}

laq_storage laq_cache::allocate(uint32_t n_cells) const {
    laq_storage res;
    res.layers.resize(layers.size());
    for (const auto & [_, buf] : kv->ctxs_bufs) {
        const ggml_init_params ip = { 4 * layers.size() * ggml_tensor_overhead(), nullptr, true };

        ggml_context_ptr nctx(ggml_init(ip));
        const auto       like = [&](const ggml_tensor * t) {
            ggml_tensor * n = ggml_new_tensor_3d(nctx.get(), t->type, t->ne[0], n_cells, 1);
            return ggml_set_name(n, t->name);
        };
        const auto stream = [&](ggml_tensor * t) {
            return ggml_view_2d(nctx.get(), t, t->ne[0], n_cells, t->nb[1], 0);
        };
        for (uint32_t ikv = 0; ikv < layers.size(); ++ikv) {
            if (k(ikv)->buffer == buf.get()) {
                laq_kv_tensors & l = res.layers[ikv];
                l.k                = like(kv->layers[ikv].k);
                l.v                = like(kv->layers[ikv].v);
                l.k_stream         = stream(l.k);
                l.v_stream         = stream(l.v);
            }
        }
        ggml_backend_buffer_ptr nbuf(
            ggml_backend_alloc_ctx_tensors_from_buft(nctx.get(), ggml_backend_buffer_get_type(buf.get())));
        if (!nbuf) {
            throw laq_error(LAQ_STATUS_NO_MEMORY, "no memory for " + std::to_string(n_cells) +
                                                      " cells of the KV cache: use a smaller n_ctx or a smaller type_k "
                                                      "and type_v");
        }
        // padding cells are read by attention under a mask: no NaN in them
        ggml_backend_buffer_clear(nbuf.get(), 0);
        res.ctxs_bufs.emplace_back(std::move(nctx), std::move(nbuf));
    }
    return res;
}

void laq_cache::fill_cells(laq_storage & dst, const std::vector<uint32_t> & order, const laq_kept & kept,
                           int32_t n_intact) const {
    const auto put = [&](uint32_t i, uint32_t from, llama_pos pos) {
        dst.cells.pos_set(i, pos);
        dst.cells.ext_set(i, cells().ext_get(from));
        dst.cells.seq_add(i, 0);
    };
    if (kept.empty()) {
        for (uint32_t i = 0; i < order.size(); ++i) {
            put(i, order[i], cells().pos_get(order[i]));
        }
        dst.origin = origin;
        dst.head   = order.size();
        return;
    }

    const std::vector<uint32_t> & first = kept[0][0];

    laq_origin & o = dst.origin;
    o.n_intact     = n_intact;
    while (o.n_mixed < first.size() && pos_at(0, 0, order[first[o.n_mixed]]) < n_intact) {
        ++o.n_mixed;
    }
    // any position below n_intact that is unique and ascending will do for the mask: the lowest of all heads
    std::vector<int32_t> lowest(o.n_mixed, n_intact);
    for (uint32_t ikv = 0; ikv < layers.size(); ++ikv) {
        std::vector<int32_t> pos;
        pos.reserve(layers[ikv].n_head_kv * o.n_mixed);
        for (uint32_t h = 0; h < layers[ikv].n_head_kv; ++h) {
            for (uint32_t i = 0; i < o.n_mixed; ++i) {
                pos.push_back(pos_at(ikv, h, order[kept[ikv][h][i]]));
                lowest[i] = std::min(lowest[i], pos.back());
            }
        }
        o.pos.push_back(std::move(pos));
    }
    if (o.n_mixed > 0) {
        // the next token after a removal of everything from n_intact on must have position n_intact
        lowest.back() = n_intact - 1;
    }
    for (uint32_t i = 0; i < first.size(); ++i) {
        const uint32_t from = order[first[i]];
        put(i, from, i < o.n_mixed ? lowest[i] : cells().pos_get(from));
    }
    dst.head = first.size();
}

laq_storage laq_cache::rebuild(uint32_t n_cells, const laq_kept & kept, int32_t n_intact) {
    const std::vector<uint32_t> order = resident();

    laq_storage next = allocate(n_cells);
    next.cells.resize(n_cells);
    for (uint32_t ikv = 0; ikv < layers.size(); ++ikv) {
        move_layer(ikv, next, order, kept);
    }
    fill_cells(next, order, kept, n_intact);
    swap_storage(next);
    ++stats.n_resizes;
    return next;
}

void laq_cache::swap_storage(laq_storage & other) {
    std::swap(kv->ctxs_bufs, other.ctxs_bufs);
    std::swap(kv->v_cells[0], other.cells);
    std::swap(kv->v_heads[0], other.head);
    std::swap(origin, other.origin);

    for (uint32_t ikv = 0; ikv < layers.size(); ++ikv) {
        auto & dst = kv->layers[ikv];

        const laq_kv_tensors old = { dst.k, dst.v, dst.k_stream[0], dst.v_stream[0] };
        const laq_kv_tensors now = other.layers[ikv];

        dst.k             = now.k;
        dst.v             = now.v;
        dst.k_stream[0]   = now.k_stream;
        dst.v_stream[0]   = now.v_stream;
        other.layers[ikv] = old;
    }
}
