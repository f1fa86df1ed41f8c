#include "laq-store.h"

#include "laq-error.h"

#include "llama-hparams.h"

#include <algorithm>
#include <set>

laq_store::laq_store(llama_kv_cache & kv, const llama_hparams & hparams) : kv(kv) {
    for (const auto & src : kv.layers) {
        laq_layer layer     = {};
        layer.il            = (int32_t) src.il;
        layer.first_head    = n_heads;
        layer.n_head        = hparams.n_head(src.il);
        layer.n_head_kv     = hparams.n_head_kv(src.il);
        layer.n_embd_head_k = hparams.n_embd_head_k(src.il);
        layer.n_embd_head_v = hparams.n_embd_head_v(src.il);
        layer.softcap       = hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f;
        n_heads += layer.n_head_kv;
        layers.push_back(layer);
    }
    origins.assign((size_t) n_heads * kv.n_stream * n_cells(), -1);
    memories.assign(origins.size(), 0.0f);
}

void laq_store::check(const llama_kv_cache & kv) {
    if (kv.other || kv.layers.size() != kv.map_layer_ids.size()) {
        throw laq_error(LAQ_STATUS_UNSUPPORTED, "layers of this model share their KV cache; unset kv_budget");
    }
    for (const auto & layer : kv.layers) {
        if (!layer.k || !layer.v) {
            throw laq_error(LAQ_STATUS_UNSUPPORTED, "a layer of this model caches only K; unset kv_budget");
        }
    }
    laq_check(!kv.get_has_shift(),
              "a shift of positions waits (llama_memory_seq_add): decode a token before laq_attach()");
}

void laq_store::init_rings(uint32_t n_slots, bool with_outputs) {
    for (const auto & [_, buf] : kv.ctxs_bufs) {
        ggml_context_ptr ctx(ggml_init({ layers.size() * ggml_tensor_overhead(), nullptr, true }));
        for (uint32_t ikv = 0; ikv < layers.size(); ++ikv) {
            laq_layer & layer = layers[ikv];
            if (kv.layers[ikv].k->buffer != buf.get()) {
                continue;
            }
            // F16: attention itself rounds queries to the type of K, and outputs are means of V
            const int64_t n_row = layer.n_ring_q() + (with_outputs ? layer.n_ring_out() : 0);
            layer.ring          = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, n_row, n_slots);
            ggml_format_name(layer.ring, "laq_ring_l%d", layer.il);
        }
        if (!ggml_get_first_tensor(ctx.get())) {
            continue;
        }
        ggml_backend_buffer_ptr ring_buf(
            ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), ggml_backend_buffer_get_type(buf.get())));
        if (!ring_buf) {
            throw laq_error(LAQ_STATUS_NO_MEMORY, "no memory for the captured queries: use a smaller window_size");
        }
        ggml_backend_buffer_clear(ring_buf.get(), 0);
        ring_bufs.emplace_back(std::move(ctx), std::move(ring_buf));
    }
}

//
// what is there
//

ggml_tensor * laq_store::part(uint32_t ikv, int part, int32_t seq_id) const {
    const auto & layer = kv.layers[ikv];
    return part == 0 ? layer.k_stream[stream_of(seq_id)] : layer.v_stream[stream_of(seq_id)];
}

laq_lanes laq_store::lanes(uint32_t ikv, int p) const {
    const laq_layer & layer = layers[ikv];
    return laq_lanes(part(ikv, p, 0), layer.n_head_kv, layer.n_embd_head(p), p == 1 && v_trans());
}

bool laq_store::in_host_memory() const {
    return std::all_of(kv.layers.begin(), kv.layers.end(), [](const auto & layer) {
        return ggml_backend_buffer_is_host(layer.k->buffer) && ggml_backend_buffer_is_host(layer.v->buffer);
    });
}

uint32_t laq_store::n_used() const {
    uint32_t n = 0;
    for (const llama_kv_cells & table : kv.v_cells) {
        n += table.get_used();
    }
    return n;
}

uint32_t laq_store::n_head_kv_max() const {
    uint32_t res = 0;
    for (const laq_layer & layer : layers) {
        res = std::max(res, layer.n_head_kv);
    }
    return res;
}

std::vector<uint32_t> laq_store::resident(int32_t seq_id) const {
    const llama_kv_cells & table = cells(seq_id);
    std::vector<uint32_t>  res;
    res.reserve(table.get_used());
    for (uint32_t i = 0; i < table.used_max_p1(); ++i) {
        if (!table.is_empty(i) && table.seq_has(i, seq_id)) {
            res.push_back(i);
        }
    }
    const auto before = [&](uint32_t a, uint32_t b) { return table.pos_get(a) < table.pos_get(b); };
    if (!std::is_sorted(res.begin(), res.end(), before)) {
        std::stable_sort(res.begin(), res.end(), before);
    }
    return res;
}

uint32_t laq_store::n_resident(int32_t seq_id) const {
    const llama_kv_cells & table = cells(seq_id);
    uint32_t               n     = 0;
    for (uint32_t i = 0; i < table.used_max_p1(); ++i) {
        n += !table.is_empty(i) && table.seq_has(i, seq_id);
    }
    return n;
}

std::vector<uint8_t> laq_store::owned(int32_t seq_id, const std::vector<uint32_t> & order) const {
    std::vector<uint8_t> own(order.size());
    for (size_t i = 0; i < order.size(); ++i) {
        own[i] = cells(seq_id).seq_count(order[i]) == 1;
    }
    return own;
}

int32_t laq_store::pos_at(const laq_seq & seq, int32_t seq_id, uint32_t head, uint32_t cell) const {
    const int32_t pos = cells(seq_id).pos_get(cell);
    return pos < seq.n_intact ? origin(head, seq_id)[cell] : pos;
}

//
// what an eviction leaves
//

// the cells that n tokens come to: the first of those that the sequence gives up, then empty ones
static std::vector<uint32_t> places(const llama_kv_cells & table, const std::vector<uint32_t> & freed, uint32_t n) {
    std::vector<uint32_t> dst = freed;
    for (uint32_t i = 0; i < table.size() && dst.size() < n; ++i) {
        if (table.is_empty(i)) {
            dst.push_back(i);
        }
    }
    std::sort(dst.begin(), dst.end());
    dst.resize(n);
    return dst;
}

// Positions of the chosen tokens in the table. From n_intact on they are the tokens' own, and so are those of the
// sinks, which every head holds. The others are the highest below n_intact that no shared cell has.
static std::vector<int32_t> table_positions(const int32_t * chosen, uint32_t n, int32_t n_intact, uint32_t n_sink,
                                            const std::set<int32_t> & shared) {
    std::vector<int32_t> res(chosen, chosen + n);
    int32_t              next = n_intact - 1;
    for (uint32_t i = n; i-- > 0;) {
        if (res[i] >= n_intact || res[i] < (int32_t) n_sink) {
            continue;
        }
        while (shared.count(next)) {
            --next;
        }
        res[i] = next--;
    }
    return res;
}

laq_commit laq_store::prepare(int32_t seq_id, const std::vector<uint32_t> & order, const std::vector<uint8_t> & own,
                              const laq_choice & choice, int32_t n_intact, uint32_t n_sink) const {
    const uint32_t n = choice.n;

    laq_fault();
    laq_commit            res = { {}, cells(seq_id), 0 };
    std::vector<uint32_t> freed;
    std::set<int32_t>     shared;
    for (size_t i = 0; i < order.size(); ++i) {
        if (own[i]) {
            freed.push_back(order[i]);
        } else {
            shared.insert(res.table.pos_get(order[i]));
        }
    }
    const std::vector<int32_t>     pos = table_positions(choice.pos.data(), n, n_intact, n_sink, shared);
    std::vector<llama_kv_cell_ext> ext(n);
    for (uint32_t i = 0; i < n; ++i) {
        ext[i] = choice.cell[i] < 0 ? llama_kv_cell_ext() : res.table.ext_get(choice.cell[i]);
    }
    res.dst = places(res.table, freed, n);
    for (const uint32_t cell : freed) {
        res.table.rm(cell);
    }
    for (uint32_t i = 0; i < n; ++i) {
        res.table.pos_set(res.dst[i], pos[i]);
        res.table.ext_set(res.dst[i], ext[i]);
        res.table.seq_add(res.dst[i], seq_id);
    }
    res.head = res.table.get_used() == n ? n : 0;
    return res;
}

void laq_store::commit(int32_t seq_id, const laq_seq & before, const std::vector<uint32_t> & order,
                       const std::vector<uint8_t> & own, const laq_choice & choice, laq_commit & done) {
    for (uint32_t head = 0; head < n_heads; ++head) {
        int32_t * held = origin(head, seq_id);
        for (size_t i = 0; i < order.size(); ++i) {
            if (!own[i]) {
                held[order[i]]                 = pos_at(before, seq_id, head, order[i]);
                memory(head, seq_id)[order[i]] = 0.0f;
            }
        }
        for (uint32_t i = 0; i < choice.n; ++i) {
            held[done.dst[i]] = choice.pos[(size_t) head * choice.n + i];
        }
    }
    std::swap(kv.v_cells[stream_of(seq_id)], done.table);
    kv.v_heads[stream_of(seq_id)] = done.head;
}

void laq_store::remove(int32_t seq_id) {
    for (const uint32_t cell : resident(seq_id)) {
        kv.v_cells[stream_of(seq_id)].seq_rm(cell, seq_id);
    }
    rewind(seq_id);
}

//
// bytes
//

template <typename T> static uint64_t bytes_of(const T & bufs) {
    uint64_t res = 0;
    for (const auto & [_, buf] : bufs) {
        res += ggml_backend_buffer_get_size(buf.get());
    }
    return res;
}

uint64_t laq_store::kv_bytes() const {
    return bytes_of(kv.ctxs_bufs);
}

uint64_t laq_store::ring_bytes() const {
    return bytes_of(ring_bufs);
}

std::string laq_store::devices() const {
    std::string res;
    for (const auto & [_, buf] : kv.ctxs_bufs) {
        const ggml_backend_dev_t dev = laq_device_of(buf.get());
        res += (res.empty() ? "" : " ") + std::string(dev ? ggml_backend_dev_name(dev) : "unknown");
    }
    return res;
}
