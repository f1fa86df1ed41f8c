#include "laq-cache.h"

#include "laq-graph.h"
#include "laq-move.h"
#include "laq-park.h"
#include "laq-recall.h"

#include "ggml-backend.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cstdlib>

void laq_ring::forget(int32_t p0) {
    for (int32_t & p : pos) {
        p = p >= p0 ? -1 : p;
    }
}

//
// construction
//

laq_cache::laq_cache(llama_context * ctx, const laq_params & p) :
    ctx(ctx), kv(static_cast<llama_kv_cache *>(ctx->get_memory())), params(p), n_ctx(p.n_ctx ? p.n_ctx : ctx->n_ctx()),
    seqs(ctx->n_seq_max()), captures_outputs(p.value_fit > 0.0f), debug(getenv("LAQ_DEBUG") != nullptr),
    n_ctx_own(ctx->n_ctx_seq()) {
    set_params(p);
    init_layers();
    init_rings();
    const laq_mover_choice mover = laq_choose_mover(*this);
    by_graph                     = mover.by_graph;
    compact_reason               = mover.reason;
    stats.compact_graph          = by_graph;
    for (const auto & [_, buf] : kv->ctxs_bufs) {
        const ggml_backend_dev_t dev = laq_device_of(buf.get());
        devices += (devices.empty() ? "" : " ") + std::string(dev ? ggml_backend_dev_name(dev) : "unknown");
    }
    if (params.archive) {
        recall = std::make_unique<laq_recall_state>(*this);
        laq_choose_attend(*this);
    }
    stats.n_ctx         = n_ctx;
    stats.kv_bytes_full = kv_bytes() / n_cells() * n_ctx;

    kv->laq = this;
    // the logical length decides between the long and the short RoPE factors
    ctx->set_laq(this, n_ctx);
}

laq_cache::~laq_cache() {
    ctx->synchronize();  // a device may still write to the rings
    kv->laq = nullptr;
    ctx->set_laq(nullptr, n_ctx_own);
}

void laq_cache::set_params(const laq_params & p) {
    params = p;
    pinned.assign(p.pinned, p.pinned + p.n_pinned);
    params.pinned  = pinned.data();
    params.n_chunk = laq_policy_chunk(params, n_cells());
    for (laq_seq & seq : seqs) {
        seq.pinned    = pinned;
        seq.remembers = false;
    }
    for (const auto & p : parked) {
        p->pinned    = pinned;
        p->remembers = false;
    }
}

void laq_cache::check_layers(const llama_context & ctx) {
    const auto * kv = static_cast<const llama_kv_cache *>(ctx.get_memory());

    if (kv->other || kv->layers.size() != kv->map_layer_ids.size()) {
        throw laq_error(LAQ_STATUS_UNSUPPORTED, "layers of this model share their KV cache; unset kv_budget");
    }
    if (kv->n_stream != 1) {
        throw laq_error(LAQ_STATUS_UNSUPPORTED,
                        "every sequence has cells of its own: make the context with kv_unified = true");
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
        layer.origin.assign((size_t) layer.n_head_kv * n_cells(), -1);
        layer.memory.assign((size_t) layer.n_head_kv * n_cells(), 0.0f);
        layers.push_back(std::move(layer));
    }
}

void laq_cache::init_rings() {
    const uint32_t n_ring = std::max(params.n_window, params.n_window_snapkv) + params.n_lookahead;

    n_slots            = 0;
    const auto reserve = [&](laq_ring & ring, uint32_t n) {
        ring.first = n_slots;
        ring.pos.assign(n, -1);
        ring.exact.assign(n, 0);
        n_slots += n;
    };
    for (laq_seq & seq : seqs) {
        reserve(seq.ring, n_ring);
    }
    reserve(scratch, params.n_window + laq_policy_probe_ahead(params));
    ++n_slots;

    for (const auto & [_, buf] : kv->ctxs_bufs) {
        const ggml_init_params ip = { layers.size() * ggml_tensor_overhead(), nullptr, true };

        ggml_context_ptr rctx(ggml_init(ip));
        for (uint32_t ikv = 0; ikv < layers.size(); ++ikv) {
            laq_layer & layer = layers[ikv];
            if (k(ikv)->buffer != buf.get()) {
                continue;
            }
            // F16: attention itself rounds queries to the type of K, and outputs are means of V
            const int64_t n_row = layer.n_ring_q() + (captures_outputs ? layer.n_ring_out() : 0);
            layer.ring          = ggml_new_tensor_2d(rctx.get(), GGML_TYPE_F16, n_row, n_slots);
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
}

void laq_cache::reserve() {
    try {
        ctx->sched_reserve();
    } catch (const laq_error &) {
        throw;
    } catch (const std::exception & e) {
        throw laq_error(LAQ_STATUS_NO_MEMORY, std::string(e.what()) + ": use a smaller n_ubatch or fewer cells");
    }
    for (const laq_layer & layer : layers) {
        if (layer.has_bias) {
            throw laq_error(LAQ_STATUS_UNSUPPORTED, "models with an attention bias cannot be evicted: unset kv_budget");
        }
    }
    if (recall) {
        recall->scorer.place(*this, recall->row_type(*this, 0));
    }
}

//
// what is there
//

laq_params laq_cache::params_of(int32_t seq_id) const {
    laq_params p = params;
    p.pinned     = seqs[seq_id].pinned.data();
    p.n_pinned   = seqs[seq_id].pinned.size();
    return p;
}

const llama_kv_cells & laq_cache::cells() const {
    return kv->v_cells[0];
}

ggml_tensor * laq_cache::k(uint32_t ikv) const {
    return kv->layers[ikv].k;
}

ggml_tensor * laq_cache::v(uint32_t ikv) const {
    return kv->layers[ikv].v;
}

bool laq_cache::v_trans() const {
    return kv->v_trans;
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

uint32_t laq_cache::n_used() const {
    return cells().get_used();
}

int32_t laq_cache::n_tokens(int32_t seq_id) const {
    // where the intact suffix was removed and no other token is held, its beginning is where tokens go on
    return std::max(cells().seq_pos_max(seq_id) + 1, seqs[seq_id].n_intact);
}

std::vector<uint32_t> laq_cache::resident(int32_t seq_id) const {
    std::vector<uint32_t> res;
    res.reserve(n_used());
    for (uint32_t i = 0; i < cells().used_max_p1(); ++i) {
        if (!cells().is_empty(i) && cells().seq_has(i, seq_id)) {
            res.push_back(i);
        }
    }
    const auto before = [&](uint32_t a, uint32_t b) { return cells().pos_get(a) < cells().pos_get(b); };
    if (!std::is_sorted(res.begin(), res.end(), before)) {
        std::stable_sort(res.begin(), res.end(), before);
    }
    return res;
}

uint32_t laq_cache::n_resident(int32_t seq_id) const {
    if (seqs.size() == 1) {
        return n_used();
    }
    uint32_t n = 0;
    for (uint32_t i = 0; i < cells().used_max_p1(); ++i) {
        n += !cells().is_empty(i) && cells().seq_has(i, seq_id);
    }
    return n;
}

int32_t laq_cache::pos_at(int32_t seq_id, uint32_t ikv, uint32_t h, uint32_t cell) const {
    const int32_t pos = cells().pos_get(cell);
    return pos < seqs[seq_id].n_intact ? layers[ikv].origin[(size_t) h * n_cells() + cell] : pos;
}

template <typename T> static uint64_t bytes_of(const T & bufs) {
    uint64_t res = 0;
    for (const auto & [_, buf] : bufs) {
        res += ggml_backend_buffer_get_size(buf.get());
    }
    return res;
}

std::vector<float> laq_cache::queries(uint32_t ikv, int32_t slot, uint32_t n) const {
    const laq_layer &    layer = layers[ikv];
    const size_t         n_row = layer.n_ring_q();
    const size_t         step  = layer.ring->nb[1];
    std::vector<uint8_t> rows((n - 1) * step + n_row * sizeof(ggml_fp16_t));
    std::vector<float>   res(n * n_row);
    ggml_backend_tensor_get(layer.ring, rows.data(), slot * step, rows.size());
    for (uint32_t i = 0; i < n; ++i) {
        ggml_fp16_to_fp32_row((const ggml_fp16_t *) (rows.data() + i * step), res.data() + i * n_row, n_row);
    }
    return res;
}

void laq_cache::set_output(uint32_t ikv, int32_t slot, const std::vector<float> & out) const {
    const laq_layer &        layer = layers[ikv];
    std::vector<ggml_fp16_t> row(out.size());
    ggml_fp32_to_fp16_row(out.data(), row.data(), row.size());
    ggml_backend_tensor_set(layer.ring, row.data(), slot * layer.ring->nb[1] + layer.n_ring_q() * sizeof(ggml_fp16_t),
                            row.size() * sizeof(ggml_fp16_t));
}

int laq_cache::n_threads() const {
    return ctx->get_cparams().n_threads_batch;
}

uint64_t laq_cache::kv_bytes() const {
    return bytes_of(kv->ctxs_bufs);
}

uint64_t laq_cache::ring_bytes() const {
    return bytes_of(ring_bufs);
}

uint64_t laq_cache::compute_bytes() const {
    ggml_backend_sched_t sched = ctx->get_sched();

    uint64_t res = 0;
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        res += ggml_backend_sched_get_buffer_size(sched, ggml_backend_sched_get_backend(sched, i));
    }
    return res;
}

//
// captured queries
//

uint32_t laq_cache::n_captured(uint32_t n_tokens) const {
    if (probing) {
        return std::min<uint32_t>(n_tokens, scratch.pos.size());
    }
    // the tokens of one sequence come in order: the last ones are the newest. Those of several may come in any
    return seqs.size() == 1 ? std::min<uint32_t>(n_tokens, seqs[0].ring.pos.size()) : n_tokens;
}

void laq_cache::capture(const llama_ubatch & ubatch, uint32_t n, int64_t * slots) {
    const bool           attending = attends(ubatch);
    std::vector<int32_t> newest(seqs.size(), -1);
    for (uint32_t i = 0; i < n; ++i) {
        const uint32_t row    = ubatch.n_tokens - 1 - i;
        const int32_t  pos    = ubatch.pos[row];
        const int32_t  seq_id = ubatch.seq_id[row][0];
        if (seq_id >= (int32_t) seqs.size()) {
            slots[n - 1 - i] = n_slots - 1;  // a unified cache takes more sequences than n_seq_max: not ours
            continue;
        }
        laq_ring & ring = probing ? scratch : seqs[seq_id].ring;

        newest[seq_id] = std::max(newest[seq_id], pos);
        // no two rows of a graph may go to one slot
        const bool stale = pos + (int32_t) ring.pos.size() <= newest[seq_id];

        slots[n - 1 - i] = stale ? n_slots - 1 : ring.slot_of(pos);
        if (!stale) {
            const int32_t at = ring.slot_of(pos) - ring.first;
            ring.pos[at]     = pos;
            ring.exact[at]   = !probing && (seqs[seq_id].n_intact == 0 || attending);
        }
    }
    stats.n_decoded += ubatch.n_tokens;
    if (recall && !probing && seqs[0].n_intact > 0 && !attending) {
        seqs[0].n_exact = std::min(seqs[0].n_exact, ubatch.pos[0]);
    }
    if (recall && !probing) {
        recall->note(ubatch);
    }
}

void laq_cache::reset(int32_t seq_id) {
    laq_seq & seq = seqs[seq_id];
    seq.n_intact  = 0;
    seq.n_settled = 0;
    seq.in_parts  = false;
    seq.pending   = std::nullopt;
    seq.remembers = false;
    seq.fitted    = false;
    seq.attending = false;
    seq.n_exact   = INT32_MAX;
    if (!keep_rings) {
        seq.ring.forget(0);
        if (recall) {
            recall->archive.clear();
            recall->forget(0);
        }
    }
}
