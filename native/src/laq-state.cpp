// What a saved state of an attached context carries in front of its cells: of each sequence the positions that heads
// hold, its phase, its captured queries, its archive. A context without one stops at the magic number, since upstream
// expects the number of streams there.
//
// A state is checked before anything changes, as far as it can be without its cells. Where the cells do not fit what
// was said of them, the sequence is removed.

#include "laq-state.h"

#include "laq-hooks.h"

#include "llama-io.h"

#include <algorithm>
#include <cstring>
#include <typeinfo>

static constexpr uint32_t STATE_MAGIC   = 0x3151414c;  // "LAQ1"
static constexpr uint32_t STATE_VERSION = 9;

template <typename T> static void put(llama_io_write_i & io, const T & value) {
    io.write(&value, sizeof(value));
}

template <typename T> static T get(llama_io_read_i & io) {
    T value{};
    io.read(&value, sizeof(value));
    return value;
}

// cells of a sequence below its n_intact, in order of the table's positions
static std::vector<uint32_t> mixed_cells(const laq_context & laq, int32_t s) {
    std::vector<uint32_t> res = laq.store.resident(s);
    const auto            end = std::find_if(res.begin(), res.end(), [&](uint32_t cell) {
        return laq.store.cells(s).pos_get(cell) >= laq.seqs[s].n_intact;
    });
    res.erase(end, res.end());
    return res;
}

//
// writing
//

static void write_origin(const laq_context & laq, llama_io_write_i & io, int32_t s) {
    const std::vector<uint32_t> mixed      = mixed_cells(laq, s);
    const bool                  has_memory = laq.seqs[s].phase.probed();
    std::vector<int32_t>        pos(mixed.size());
    std::vector<float>          memory(has_memory ? mixed.size() : 0);
    put<uint32_t>(io, mixed.size());
    put<uint32_t>(io, has_memory);
    put<uint32_t>(io, laq.store.n_heads);
    for (uint32_t head = 0; head < laq.store.n_heads; ++head) {
        for (size_t i = 0; i < mixed.size(); ++i) {
            pos[i] = laq.store.origin(head, s)[mixed[i]];
        }
        for (size_t i = 0; i < memory.size(); ++i) {
            memory[i] = laq.store.memory(head, s)[mixed[i]];
        }
        io.write(pos.data(), pos.size() * sizeof(int32_t));
        io.write(memory.data(), memory.size() * sizeof(float));
    }
}

static void write_seq(llama_io_write_i & io, const laq_seq & seq) {
    put(io, seq.n_intact);
    put(io, seq.n_exact);
    put<uint32_t>(io, seq.fitted);
    put<uint32_t>(io, seq.phase.kind);
    put<uint32_t>(io, (uint32_t) seq.phase.how);
    put(io, seq.phase.begin);
    put(io, seq.phase.n_prompt);
}

// Rows are written as bytes and not as tensors: they are read before it is known whether the state fits.
static void write_ring(const laq_context & laq, llama_io_write_i & io, int32_t s) {
    const laq_ring &     ring = laq.seqs[s].ring;
    std::vector<uint8_t> row;
    put<uint32_t>(io, ring.size());
    io.write(ring.pos.data(), ring.size() * sizeof(int32_t));
    io.write(ring.output.data(), ring.size());
    for (const laq_layer & layer : laq.store.layers) {
        const size_t size = layer.ring->nb[1];
        row.resize(size);
        put<uint32_t>(io, size);
        for (uint32_t i = 0; i < ring.size(); ++i) {
            if (ring.pos[i] >= 0) {
                ggml_backend_tensor_get(layer.ring, row.data(), (ring.first + i) * size, size);
                io.write(row.data(), size);
            }
        }
    }
}

// Whether a writer only counts bytes, as llama_state_get_size() does: nothing is read from the archive's file for it.
static bool only_counts(const llama_io_write_i & io) {
    return strstr(typeid(io).name(), "llama_io_write_dummy") != nullptr;
}

// the archive, or that it is not there
static void write_archive(const laq_context & laq, llama_io_write_i & io, int32_t s) {
    laq_archive * archive = laq.now.archives ? laq.archive_of(s) : nullptr;
    put<uint32_t>(io, archive != nullptr);
    if (!archive) {
        return;
    }
    put(io, archive->type(0));
    put(io, archive->type(1));
    put<uint64_t>(io, archive->block_bytes());
    put<uint32_t>(io, archive->n_held());
    archive->visit(
        [&](uint32_t index, uint64_t held, const uint8_t * bytes, size_t n) {
            put(io, index);
            put(io, held);
            io.write(bytes, n);
        },
        !only_counts(io));
}

void laq_kv_state_write(const laq_context & laq, llama_io_write_i & io, int32_t seq_id) {
    if (seq_id >= (int32_t) laq.seqs.size()) {
        throw std::runtime_error("sequences from n_seq_max on are not saved with kv_budget");
    }
    const int32_t first = seq_id < 0 ? 0 : seq_id;
    const int32_t last  = seq_id < 0 ? laq.seqs.size() : seq_id + 1;

    put(io, STATE_MAGIC);
    put(io, STATE_VERSION);
    put<uint32_t>(io, last - first);
    put<uint32_t>(io, laq.store.kv.get_n_stream());
    for (int32_t s = first; s < last; ++s) {
        put<uint32_t>(io, laq.store.n_resident(s));
        write_seq(io, laq.seqs[s]);
        write_origin(laq, io, s);
        write_ring(laq, io, s);
        write_archive(laq, io, s);
    }
    put(io, STATE_MAGIC);
}

//
// reading
//

[[noreturn]] static void refuse(const std::string & what) {
    throw std::runtime_error("this state does not fit the context: " + what);
}

static void check(bool ok) {
    if (!ok) {
        refuse("it is damaged");
    }
}

static void read_seq(const laq_context & laq, llama_io_read_i & io, laq_seq & seq) {
    seq.n_intact        = get<int32_t>(io);
    seq.n_exact         = get<int32_t>(io);
    seq.fitted          = get<uint32_t>(io) != 0;
    const uint32_t kind = get<uint32_t>(io);
    const uint32_t how  = get<uint32_t>(io);
    seq.phase.begin     = get<int32_t>(io);
    seq.phase.n_prompt  = get<int32_t>(io);

    const int32_t n_ctx = laq.n_ctx;
    check(kind <= laq_phase::WAITING && how <= (uint32_t) laq_read_how::ATTENDING);
    check(seq.n_intact >= 0 && seq.n_intact <= n_ctx && seq.n_exact >= 0);
    check(seq.phase.begin >= 0 && seq.phase.begin <= n_ctx && seq.phase.n_prompt >= 0 && seq.phase.n_prompt <= n_ctx);
    seq.phase.kind = (laq_phase::kind_t) kind;
    seq.phase.how  = (laq_read_how) how;
}

static void read_origin(const laq_context & laq, llama_io_read_i & io, laq_saved & saved) {
    saved.n_mixed         = get<uint32_t>(io);
    const bool has_memory = get<uint32_t>(io) != 0;
    if (get<uint32_t>(io) != laq.store.n_heads) {
        refuse("another number of layers or KV heads");
    }
    check(saved.n_mixed <= saved.n_resident && (int64_t) saved.n_mixed <= saved.seq.n_intact);
    saved.origin.resize((size_t) laq.store.n_heads * saved.n_mixed);
    saved.memory.resize(has_memory ? saved.origin.size() : 0);
    for (uint32_t head = 0; head < laq.store.n_heads; ++head) {
        int32_t * pos = saved.origin.data() + (size_t) head * saved.n_mixed;
        io.read(pos, saved.n_mixed * sizeof(int32_t));
        std::vector<int32_t> sorted(pos, pos + saved.n_mixed);
        std::sort(sorted.begin(), sorted.end());
        check(std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end());
        check(sorted.empty() || (sorted.front() >= 0 && sorted.back() < saved.seq.n_intact));
        if (has_memory) {
            io.read(saved.memory.data() + (size_t) head * saved.n_mixed, saved.n_mixed * sizeof(float));
        }
    }
}

static void read_ring(const laq_context & laq, llama_io_read_i & io, laq_saved & saved) {
    laq_ring & ring = saved.seq.ring;
    ring            = laq.seqs[saved.seq_id].ring;
    if (get<uint32_t>(io) != ring.size()) {
        refuse("another window_size, snapkv_window or lookahead_size");
    }
    io.read(ring.pos.data(), ring.size() * sizeof(int32_t));
    io.read(ring.output.data(), ring.size());
    for (uint32_t i = 0; i < ring.size(); ++i) {
        check(ring.pos[i] == -1 || (ring.pos[i] >= 0 && ring.pos[i] % ring.size() == i));
        check(ring.output[i] <= laq_output::ALL);
    }
    const size_t n_held = ring.size() - std::count(ring.pos.begin(), ring.pos.end(), -1);
    for (const laq_layer & layer : laq.store.layers) {
        const size_t n_q   = layer.n_ring_q() * sizeof(ggml_fp16_t);
        const size_t size  = layer.ring->nb[1];
        const size_t n_row = get<uint32_t>(io);
        // outputs are there or not, as value_fit had it
        if (n_row != size && n_row != n_q && n_row != n_q + layer.n_ring_out() * sizeof(ggml_fp16_t)) {
            refuse("another model");
        }
        saved.with_outputs &= n_row == size;
        std::vector<uint8_t> row(n_row);
        for (size_t i = 0; i < n_held; ++i) {
            io.read(row.data(), n_row);
            const size_t at = saved.ring.size();
            saved.ring.resize(at + size);
            memcpy(saved.ring.data() + at, row.data(), std::min(n_row, size));
        }
    }
    if (!saved.with_outputs) {
        std::fill(ring.output.begin(), ring.output.end(), laq_output::NONE);
    }
}

static void read_archive(const laq_context & laq, llama_io_read_i & io, laq_saved & saved) {
    if (get<uint32_t>(io) == 0) {
        return;
    }
    const laq_archive * ours = laq.archive_of(saved.seq_id);
    if (!ours) {
        refuse("it was saved with kv_recall, and there is none here");
    }
    const int32_t  type_k  = get<int32_t>(io);
    const int32_t  type_v  = get<int32_t>(io);
    const uint64_t n_bytes = get<uint64_t>(io);
    if (type_k != ours->type(0) || type_v != ours->type(1) || n_bytes != ours->block_bytes()) {
        refuse("another kv_recall_type, type_k or type_v");
    }
    const uint32_t n = get<uint32_t>(io);
    saved.archive    = ours->another();
    for (uint32_t i = 0, next = 0; i < n; ++i) {
        const uint32_t index = get<uint32_t>(io);
        const uint64_t held  = get<uint64_t>(io);
        // ascending, so that what a damaged state asks for is bounded
        check(index >= next && (int64_t) index * laq_archive::N_BLOCK < laq.n_ctx);
        next = index + 1;
        io.read(saved.archive->restore(index), n_bytes);
        saved.archive->restored(index, held);
    }
}

static void read_tables(laq_context & laq, llama_io_read_i & io, int32_t seq_id) {
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
    const uint32_t n_seqs = get<uint32_t>(io);
    if (n_seqs != (seq_id < 0 ? laq.seqs.size() : 1)) {
        refuse("another number of sequences");
    }
    if (get<uint32_t>(io) != laq.store.kv.get_n_stream()) {
        refuse("another kv_unified");
    }
    std::vector<laq_saved> saved(n_seqs);
    for (uint32_t i = 0; i < n_seqs; ++i) {
        saved[i].seq_id     = seq_id < 0 ? (int32_t) i : seq_id;
        saved[i].n_resident = get<uint32_t>(io);
        if (saved[i].n_resident > laq.store.n_cells()) {
            refuse(std::to_string(saved[i].n_resident) + " cells, but there are " +
                   std::to_string(laq.store.n_cells()) + ": raise kv_budget or kv_staging");
        }
        read_seq(laq, io, saved[i].seq);
        read_origin(laq, io, saved[i]);
        read_ring(laq, io, saved[i]);
        read_archive(laq, io, saved[i]);
    }
    check(get<uint32_t>(io) == STATE_MAGIC);
    laq.saved = std::move(saved);
}

//
// once the cells are there
//

static void restore_tables(laq_context & laq, const laq_saved & saved, const std::vector<uint32_t> & mixed) {
    for (uint32_t head = 0; head < laq.store.n_heads; ++head) {
        const size_t at = (size_t) head * saved.n_mixed;
        for (uint32_t i = 0; i < saved.n_mixed; ++i) {
            laq.store.origin(head, saved.seq_id)[mixed[i]] = saved.origin[at + i];
            laq.store.memory(head, saved.seq_id)[mixed[i]] = saved.memory.empty() ? 0.0f : saved.memory[at + i];
        }
    }
}

static void restore_ring(const laq_context & laq, const laq_saved & saved) {
    const laq_ring & ring = saved.seq.ring;
    const uint8_t *  row  = saved.ring.data();
    for (const laq_layer & layer : laq.store.layers) {
        const size_t size = layer.ring->nb[1];
        for (uint32_t i = 0; i < ring.size(); ++i) {
            if (ring.pos[i] >= 0) {
                ggml_backend_tensor_set(layer.ring, row, (ring.first + i) * size, size);
                row += size;
            }
        }
    }
}

// false: the cells are not those that the state told of
static bool restore(laq_context & laq, laq_saved & saved) {
    const int32_t s = saved.seq_id;
    if (saved.n_resident == 0) {
        laq.store.kv.seq_rm(s, -1, -1);  // upstream leaves what was there where no cells were saved
    }
    const int32_t last = std::max(laq.store.cells(s).seq_pos_max(s), saved.seq.n_intact - 1);
    if (laq.store.n_resident(s) != saved.n_resident || last >= (int32_t) laq.n_ctx ||
        std::max(saved.seq.phase.begin, saved.seq.phase.n_prompt) > last + 1) {
        return false;
    }
    const std::vector<uint32_t> order = laq.store.resident(s);
    const auto                  same  = [&](uint32_t a, uint32_t b) {
        return laq.store.cells(s).pos_get(a) == laq.store.cells(s).pos_get(b);
    };
    if (std::adjacent_find(order.begin(), order.end(), same) != order.end()) {
        return false;
    }
    laq_seq & seq                     = laq.seqs[s];
    seq.n_intact                      = saved.seq.n_intact;
    seq.n_exact                       = saved.seq.n_exact;
    seq.fitted                        = saved.seq.fitted;
    seq.phase                         = saved.seq.phase;
    const std::vector<uint32_t> mixed = mixed_cells(laq, s);
    if (mixed.size() != saved.n_mixed) {
        return false;
    }
    restore_tables(laq, saved, mixed);
    restore_ring(laq, saved);
    seq.ring = saved.seq.ring;
    seq.history.forget(0);
    if (laq_archive * archive = laq.archive_of(s)) {
        archive->clear();
        if (saved.archive) {
            archive->take(*saved.archive);
        } else {
            // of a conversation with a gap, those of the gap are counted, too
            archive->n_lost += std::max<int64_t>(0, (int64_t) seq.n_intact - saved.n_mixed) * archive->rows_of_token();
        }
    }
    return true;
}

laq_kv_reading::laq_kv_reading(laq_context * laq, llama_io_read_i & io, int32_t seq_id) : laq(laq) {
    if (laq) {
        read_tables(*laq, io, seq_id);
    }
}

laq_kv_reading::~laq_kv_reading() {
    for (size_t i = 0; laq && i < laq->saved.size(); ++i) {
        laq->store.remove(laq->saved[i].seq_id);
        laq->reset(laq->saved[i].seq_id);
    }
    if (laq) {
        laq->saved.clear();
    }
}

bool laq_kv_position_fits(const laq_context & laq, int32_t pos) {
    return pos >= 0 && pos < (int32_t) laq.n_ctx;
}

void laq_kv_reading::done() {
    if (!laq) {
        return;
    }
    bool ok = true;
    for (laq_saved & saved : laq->saved) {
        ok = restore(*laq, saved) && ok;
    }
    check(ok);  // they are removed if not
    laq->saved.clear();
}

//
// in memory
//

std::vector<uint8_t> laq_state_of_cells(laq_context & laq, int32_t seq_id) {
    const laq_during during(laq.now.archives, false);
    laq_fault();
    laq.ctx->synchronize();
    std::vector<uint8_t> res(laq.ctx->state_seq_get_size(seq_id, 0));
    if (res.empty() || laq.ctx->state_seq_get_data(seq_id, res.data(), res.size(), 0) != res.size()) {
        throw laq_error(LAQ_STATUS_NO_MEMORY, "the cells could not be set aside in host memory");
    }
    return res;
}

void laq_set_state_of_cells(laq_context & laq, int32_t seq_id, const std::vector<uint8_t> & state) {
    laq_archive *  archive = laq.archive_of(seq_id);
    const uint64_t n_lost  = archive ? archive->n_lost : 0;
    if (laq.store.n_used() == 0) {
        laq.store.rewind(seq_id);  // cells lie in the order they had, so that sums over them are the same
    }
    laq.ctx->synchronize();
    const size_t n = laq.ctx->state_seq_set_data(seq_id, state.data(), state.size(), 0);
    if (archive) {
        archive->n_lost = n_lost;  // the archive comes by another way
    }
    if (n != state.size()) {
        laq.store.kv.seq_rm(seq_id, -1, -1);
        throw laq_error(LAQ_STATUS_NO_MEMORY,
                        "no cells for a parked sequence: " + std::to_string(laq.store.n_used(seq_id)) + " of " +
                            std::to_string(laq.store.n_cells()) + " are in use by other sequences");
    }
}
