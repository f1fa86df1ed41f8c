// What a saved state of an attached context carries in front of its cells: of each sequence the tables of evicted cells,
// the eviction that waits, and the captured queries that the next one will ask for. A context without one stops at the
// magic number, since upstream expects the number of streams there.

#include "laq-cache.h"
#include "laq-recall.h"

#include "ggml-backend.h"
#include "llama-io.h"

#include <algorithm>
#include <utility>

static constexpr uint32_t STATE_MAGIC   = 0x3151414c;  // "LAQ1"
static constexpr uint32_t STATE_VERSION = 8;

template <typename T> static void put(llama_io_write_i & io, const T & value) {
    io.write(&value, sizeof(value));
}

template <typename T> static T get(llama_io_read_i & io) {
    T value;
    io.read(&value, sizeof(value));
    return value;
}

//
// writing
//

static void write_origin(const laq_cache & laq, llama_io_write_i & io, int32_t s) {
    std::vector<uint32_t> mixed;
    for (const uint32_t cell : laq.resident(s)) {
        if (laq.cells().pos_get(cell) < laq.seqs[s].n_intact) {
            mixed.push_back(cell);
        }
    }
    put<uint32_t>(io, mixed.size());
    put<uint32_t>(io, laq.seqs[s].remembers);
    std::vector<int32_t> row(mixed.size());
    std::vector<float>   memory(laq.seqs[s].remembers ? mixed.size() : 0);
    for (uint32_t ikv = 0; ikv < laq.layers.size(); ++ikv) {
        put(io, laq.layers[ikv].n_head_kv);
        for (uint32_t h = 0; h < laq.layers[ikv].n_head_kv; ++h) {
            for (size_t i = 0; i < mixed.size(); ++i) {
                row[i] = laq.pos_at(s, ikv, h, mixed[i]);
            }
            io.write(row.data(), row.size() * sizeof(int32_t));
            for (size_t i = 0; i < memory.size(); ++i) {
                memory[i] = laq.layers[ikv].memory[(size_t) h * laq.n_cells() + mixed[i]];
            }
            io.write(memory.data(), memory.size() * sizeof(float));
        }
    }
}

static void write_ring(const laq_cache & laq, llama_io_write_i & io, int32_t s) {
    const laq_ring & ring = laq.seqs[s].ring;
    put<uint32_t>(io, ring.pos.size());
    io.write(ring.pos.data(), ring.pos.size() * sizeof(int32_t));
    io.write(ring.exact.data(), ring.exact.size());
    for (const laq_layer & layer : laq.layers) {
        put<uint32_t>(io, layer.ring->nb[1]);
        for (size_t i = 0; i < ring.pos.size(); ++i) {
            if (ring.pos[i] >= 0) {
                io.write_tensor(layer.ring, (ring.first + i) * layer.ring->nb[1], layer.ring->nb[1]);
            }
        }
    }
}

// the archive, or that it is not there
static void write_archive(const laq_cache & laq, llama_io_write_i & io) {
    const bool carried = laq.recall && laq.save_archive;
    put<uint32_t>(io, carried);
    if (!carried) {
        return;
    }
    laq_archive & archive = laq.recall->archive;
    put<int32_t>(io, laq.recall->type[0]);
    put<int32_t>(io, laq.recall->type[1]);
    put<uint64_t>(io, archive.block_bytes());
    put<uint32_t>(io, archive.n_held());
    archive.visit([&](uint32_t index, uint64_t held, const uint8_t * bytes, size_t n) {
        put(io, index);
        put(io, held);
        io.write(bytes, n);
    });
}

void laq_kv_state_write(const laq_cache & laq, llama_io_write_i & io, int32_t seq_id) {
    if (seq_id >= (int32_t) laq.seqs.size()) {
        throw std::runtime_error("sequences from n_seq_max on are not saved with kv_budget");
    }
    const int32_t first = seq_id < 0 ? 0 : seq_id;
    const int32_t last  = seq_id < 0 ? laq.seqs.size() : seq_id + 1;

    put(io, STATE_MAGIC);
    put(io, STATE_VERSION);
    put<uint32_t>(io, laq.layers.size());
    put<uint32_t>(io, last - first);
    for (int32_t s = first; s < last; ++s) {
        const laq_seq & seq = laq.seqs[s];
        put<uint32_t>(io, laq.n_resident(s));
        put(io, seq.n_intact);
        put(io, seq.n_settled);
        put<int32_t>(io, seq.pending ? seq.pending->n_prompt : -1);
        put<uint32_t>(io, seq.fitted);
        put<uint32_t>(io, seq.in_parts);
        put(io, seq.n_exact);
        put<uint32_t>(io, seq.attending);
        write_origin(laq, io, s);
        write_ring(laq, io, s);
        write_archive(laq, io);
    }
}

std::vector<uint8_t> laq_state_of_cells(laq_cache & laq, int32_t seq_id) {
    std::vector<uint8_t> res;

    laq.ctx->synchronize();
    const bool save_archive = std::exchange(laq.save_archive, false);
    size_t     n            = 0;
    try {
        res.resize(laq.ctx->state_seq_get_size(seq_id, 0));
        n = laq.ctx->state_seq_get_data(seq_id, res.data(), res.size(), 0);
    } catch (...) {
        laq.save_archive = save_archive;
        throw;
    }
    laq.save_archive = save_archive;
    if (n == 0 || n != res.size()) {
        throw laq_error(LAQ_STATUS_NO_MEMORY, "the cells could not be set aside in host memory");
    }
    return res;
}

//
// reading
//

[[noreturn]] static void refuse(const std::string & what) {
    throw std::runtime_error("this state does not fit the context: " + what);
}

static void read_origin(const laq_cache & laq, llama_io_read_i & io, laq_saved & saved) {
    const uint32_t n_mixed = get<uint32_t>(io);
    if (n_mixed > saved.n_resident) {
        refuse("it is damaged");
    }
    saved.remembers = get<uint32_t>(io) != 0;
    for (const laq_layer & layer : laq.layers) {
        if (get<uint32_t>(io) != layer.n_head_kv) {
            refuse("another number of KV heads");
        }
        std::vector<int32_t> & pos    = saved.origin.emplace_back((size_t) layer.n_head_kv * n_mixed);
        std::vector<float> &   memory = saved.memory.emplace_back(saved.remembers ? pos.size() : 0);
        for (uint32_t h = 0; h < layer.n_head_kv; ++h) {
            io.read(pos.data() + (size_t) h * n_mixed, n_mixed * sizeof(int32_t));
            if (saved.remembers) {
                io.read(memory.data() + (size_t) h * n_mixed, n_mixed * sizeof(float));
            }
        }
    }
}

static void read_ring(const laq_cache & laq, llama_io_read_i & io, laq_saved & saved) {
    const laq_ring & ring = laq.seqs[saved.seq_id].ring;
    if (get<uint32_t>(io) != ring.pos.size()) {
        refuse("another window_size, snapkv_window or lookahead_size");
    }
    saved.ring_pos.resize(ring.pos.size());
    io.read(saved.ring_pos.data(), saved.ring_pos.size() * sizeof(int32_t));
    saved.ring_exact.resize(ring.exact.size());
    io.read(saved.ring_exact.data(), saved.ring_exact.size());

    std::vector<uint8_t> row;
    for (const laq_layer & layer : laq.layers) {
        const size_t size  = layer.ring->nb[1];
        const size_t n_q   = layer.n_ring_q() * sizeof(ggml_fp16_t);
        const size_t n_row = get<uint32_t>(io);
        // outputs are there or not, as value_fit had it
        if (n_row != size && n_row != n_q && n_row != n_q + layer.n_ring_out() * sizeof(ggml_fp16_t)) {
            refuse("another model");
        }
        saved.has_outputs = n_row == size;
        if (!saved.has_outputs) {
            saved.ring_exact.assign(ring.exact.size(), 0);
        }
        row.resize(n_row);
        for (size_t i = 0; i < saved.ring_pos.size(); ++i) {
            if (saved.ring_pos[i] < 0) {
                continue;
            }
            if (n_row == size && !laq.keep_rings) {
                io.read_tensor(layer.ring, (ring.first + i) * size, size);
                continue;
            }
            io.read(row.data(), n_row);
            if (!laq.keep_rings) {
                ggml_backend_tensor_set(layer.ring, row.data(), (ring.first + i) * size, n_q);
            }
        }
    }
}

static void read_archive(const laq_cache & laq, llama_io_read_i & io, laq_saved & saved) {
    saved.has_archive = get<uint32_t>(io) != 0;
    if (!saved.has_archive) {
        return;
    }
    if (!laq.recall) {
        refuse("it was saved with kv_recall, and there is none here");
    }
    const laq_archive & archive = laq.recall->archive;
    const int32_t       type_k  = get<int32_t>(io);
    const int32_t       type_v  = get<int32_t>(io);
    const uint64_t      n_bytes = get<uint64_t>(io);
    if (type_k != laq.recall->type[0] || type_v != laq.recall->type[1] || n_bytes != archive.block_bytes()) {
        refuse("another kv_recall_type, type_k or type_v");
    }
    const uint32_t n = get<uint32_t>(io);
    for (uint32_t i = 0, next = 0; i < n; ++i) {
        laq_archive_image & image = saved.archive.emplace_back();
        image.index               = get<uint32_t>(io);
        image.held                = get<uint64_t>(io);
        // ascending, so that what a damaged state asks for is bounded
        if (image.index < next || (int64_t) image.index * laq_archive::N_BLOCK >= laq.n_ctx) {
            refuse("it is damaged");
        }
        next = image.index + 1;
        image.bytes.resize(archive.block_bytes());
        io.read(image.bytes.data(), image.bytes.size());
    }
}

void laq_kv_state_read(laq_cache & laq, llama_io_read_i & io, int32_t seq_id) {
    laq.saved.clear();
    if (seq_id >= (int32_t) laq.seqs.size()) {
        refuse("sequence " + std::to_string(seq_id) + " is not below n_seq_max");
    }
    if (get<uint32_t>(io) != STATE_MAGIC) {
        refuse("it was saved without kv_budget");
    }
    if (get<uint32_t>(io) != STATE_VERSION) {
        refuse("it was saved by another version of laq_gguf");
    }
    if (get<uint32_t>(io) != laq.layers.size()) {
        refuse("another number of layers");
    }
    const uint32_t n_seqs = get<uint32_t>(io);
    if (n_seqs != (seq_id < 0 ? laq.seqs.size() : 1)) {
        refuse("another number of sequences");
    }
    std::vector<laq_saved> saved;
    for (uint32_t i = 0; i < n_seqs; ++i) {
        laq_saved & s = saved.emplace_back();
        s.seq_id      = seq_id < 0 ? (int32_t) i : seq_id;

        s.n_resident = get<uint32_t>(io);
        if (s.n_resident > laq.n_cells()) {
            refuse(std::to_string(s.n_resident) + " cells, but there are " + std::to_string(laq.n_cells()) +
                   ": raise kv_budget or kv_staging");
        }
        s.n_intact  = get<int32_t>(io);
        s.n_settled = get<int32_t>(io);

        const int32_t n_prompt = get<int32_t>(io);
        if (n_prompt >= 0) {
            s.pending = laq_pending{ n_prompt };
        }
        s.fitted    = get<uint32_t>(io) != 0;
        s.in_parts  = get<uint32_t>(io) != 0;
        s.n_exact   = get<int32_t>(io);
        s.attending = get<uint32_t>(io) != 0;
        read_origin(laq, io, s);
        read_ring(laq, io, s);
        read_archive(laq, io, s);
    }
    laq.saved = std::move(saved);
}

static void restore_archive(laq_cache & laq, const laq_saved & saved, int64_t n_mixed) {
    if (!laq.recall || laq.keep_rings) {
        return;
    }
    laq_archive & archive = laq.recall->archive;
    archive.restore(saved.archive);
    laq.recall->forget(0);
    if (!saved.has_archive) {
        // of a conversation with a gap, those of the gap are counted, too
        archive.n_lost += std::max<int64_t>(0, saved.n_intact - n_mixed) * archive.rows_of_token();
    }
}

void laq_kv_state_done(laq_cache & laq) {
    for (laq_saved & saved : laq.saved) {
        if (saved.n_resident == 0) {
            laq.kv->seq_rm(saved.seq_id, -1, -1);  // upstream leaves what was there where no cells were saved
        }
        laq_seq & seq = laq.seqs[saved.seq_id];
        seq.n_intact  = saved.n_intact;
        seq.n_settled = saved.has_outputs ? saved.n_settled : laq.n_tokens(saved.seq_id);
        seq.pending   = saved.pending;
        seq.remembers = saved.remembers;
        seq.in_parts  = saved.in_parts;
        seq.fitted    = saved.fitted;
        seq.n_exact   = saved.n_exact;
        seq.attending = saved.attending;
        if (!laq.keep_rings) {
            seq.ring.pos   = saved.ring_pos;
            seq.ring.exact = saved.ring_exact;
        }
        std::vector<uint32_t> mixed;
        for (const uint32_t cell : laq.resident(saved.seq_id)) {
            if (laq.cells().pos_get(cell) < seq.n_intact) {
                mixed.push_back(cell);
            }
        }
        for (uint32_t ikv = 0; ikv < laq.layers.size(); ++ikv) {
            const std::vector<int32_t> & pos    = saved.origin[ikv];
            const std::vector<float> &   memory = saved.memory[ikv];
            if (pos.size() != mixed.size() * laq.layers[ikv].n_head_kv) {
                refuse("it is damaged");
            }
            for (size_t i = 0; i < pos.size(); ++i) {
                const size_t at = (i / mixed.size()) * laq.n_cells() + mixed[i % mixed.size()];

                laq.layers[ikv].origin[at] = pos[i];
                laq.layers[ikv].memory[at] = memory.empty() ? 0.0f : memory[i];
            }
        }
        restore_archive(laq, saved, mixed.size());
    }
    laq.saved.clear();
}
