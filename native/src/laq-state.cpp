// What a saved state of an attached context carries in front of its cells: the tables of evicted cells, and the
// captured queries if an eviction waits for more of them. A context without one stops at the magic number, since
// upstream expects the number of streams there.

#include "laq-cache.h"

#include "ggml-backend.h"
#include "llama-io.h"

static constexpr uint32_t STATE_MAGIC   = 0x3151414c;  // "LAQ1"
static constexpr uint32_t STATE_VERSION = 1;

template <typename T> static void put(llama_io_write_i & io, const T & value) {
    io.write(&value, sizeof(value));
}

template <typename T> static T get(llama_io_read_i & io) {
    T value;
    io.read(&value, sizeof(value));
    return value;
}

static void put_rows(llama_io_write_i & io, const std::vector<int32_t> & values) {
    io.write(values.data(), values.size() * sizeof(int32_t));
}

void laq_kv_state_write(const laq_cache & laq, llama_io_write_i & io) {
    put(io, STATE_MAGIC);
    put(io, STATE_VERSION);
    put(io, laq.n_resident());
    put<uint32_t>(io, laq.layers.size());
    put(io, laq.n_ring);
    put(io, laq.origin.n_mixed);
    put(io, laq.origin.n_intact);
    put<int32_t>(io, laq.pending ? laq.pending->n_prompt : -1);
    for (const auto & pos : laq.origin.pos) {
        put<uint32_t>(io, pos.size());
        put_rows(io, pos);
    }
    if (laq.pending) {
        put_rows(io, laq.ring_pos);
        for (const laq_layer & layer : laq.layers) {
            io.write_tensor(layer.ring, 0, ggml_nbytes(layer.ring));
        }
    }
}

[[noreturn]] static void refuse(const char * what) {
    throw std::runtime_error(std::string("this state does not fit the context: ") + what);
}

static laq_origin read_origin(const laq_cache & laq, llama_io_read_i & io, uint32_t n_mixed, int32_t n_intact) {
    laq_origin res;
    res.n_mixed  = n_mixed;
    res.n_intact = n_intact;
    if (n_intact == 0) {
        return res;
    }
    for (const laq_layer & layer : laq.layers) {
        const uint32_t n = get<uint32_t>(io);
        if (n != layer.n_head_kv * n_mixed) {
            refuse("another number of KV heads");
        }
        std::vector<int32_t> & pos = res.pos.emplace_back(n);
        io.read(pos.data(), n * sizeof(int32_t));
    }
    return res;
}

void laq_kv_state_read(laq_cache & laq, llama_io_read_i & io) {
    if (get<uint32_t>(io) != STATE_MAGIC) {
        refuse("it was saved without kv_budget");
    }
    if (get<uint32_t>(io) != STATE_VERSION) {
        refuse("it was saved by another version");
    }
    const uint32_t n_resident = get<uint32_t>(io);
    const uint32_t n_layer    = get<uint32_t>(io);
    const uint32_t n_ring     = get<uint32_t>(io);
    const uint32_t n_mixed    = get<uint32_t>(io);
    const int32_t  n_intact   = get<int32_t>(io);
    const int32_t  n_prompt   = get<int32_t>(io);
    if (n_resident > laq.n_cells_max || n_mixed > n_resident) {
        refuse("more tokens than n_ctx");
    }
    if (n_layer != laq.layers.size() || n_ring != laq.n_ring) {
        refuse("another model, window_size or lookahead_size");
    }

    auto saved    = std::make_unique<laq_saved>();
    saved->origin = read_origin(laq, io, n_mixed, n_intact);
    saved->ring_pos.assign(n_ring, -1);
    if (n_prompt >= 0) {
        saved->pending = laq_pending{ n_prompt };
        io.read(saved->ring_pos.data(), n_ring * sizeof(int32_t));
        for (const laq_layer & layer : laq.layers) {
            io.read_tensor(layer.ring, 0, ggml_nbytes(layer.ring));
        }
    }

    // the cells that come next replace these
    laq.kv->clear(false);
    laq.rebuild(laq_pad_cells(n_resident + 1, laq.n_cells_max), {}, 0);
    laq.ctx->set_laq(&laq);
    laq.saved = std::move(saved);
}
