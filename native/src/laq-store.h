#pragma once

// One KV cache: views of its K and V, the table of what each head holds, the rings of captured queries. Its cells
// change in commit() and truncate() alone.

#include "laq-rows.h"
#include "laq-seq.h"

#include "llama-kv-cache.h"

#include <cstdint>
#include <string>
#include <vector>

struct laq_layer {
    int32_t       il;          // layer of the model
    uint32_t      first_head;  // KV heads of the layers before it
    uint32_t      n_head;
    uint32_t      n_head_kv;
    uint32_t      n_embd_head_k;
    uint32_t      n_embd_head_v;
    ggml_tensor * ring = nullptr;  // F16 [n_ring_q + n_ring_out, slots]: the query of a token, then its output

    // as the model's own attention has them, known once a graph was built
    float         kq_scale = 0.0f;
    float         softcap  = 0.0f;
    ggml_tensor * sinks    = nullptr;
    bool          has_bias = false;

    int64_t n_ring_q() const { return (int64_t) n_embd_head_k * n_head; }
    int64_t n_ring_out() const { return (int64_t) n_embd_head_v * n_head; }
    int64_t n_embd_head(int part) const { return part == 0 ? n_embd_head_k : n_embd_head_v; }
};

// What every head holds after an eviction, in order of position. Rows of n tokens for each KV head of all layers.
struct laq_choice {
    uint32_t             n = 0;
    std::vector<int32_t> pos;   // [n_heads][n]
    std::vector<int32_t> cell;  // [n_heads][n], -1 = the row comes from the archive
};

// The cells and the table that an eviction leaves. Made before anything is moved.
struct laq_commit {
    std::vector<uint32_t> dst;    // cells of the chosen tokens, ascending
    llama_kv_cells        table;  // of the stream
    uint32_t              head;   // where the search for free cells begins
};

struct laq_store {
    std::vector<laq_layer> layers;  // in the order of the KV cache
    uint32_t               n_heads = 0;

    laq_store(llama_kv_cache & kv, const llama_hparams & hparams);

    // throws laq_error if the layers cannot be evicted one by one
    static void check(const llama_kv_cache & kv);

    // attach a context's hooks, or none
    void set_laq(laq_context * laq) { kv.laq = laq; }

    // rows of n_slots queries in each layer, beside its K; throws laq_error
    void init_rings(uint32_t n_slots, bool with_outputs);

    bool                   v_trans() const { return kv.v_trans; }  // a row of V is a channel of all cells, not a cell
    bool                   unified() const { return kv.n_stream == 1; }
    uint32_t               stream_of(int32_t seq_id) const { return kv.seq_to_stream[seq_id]; }
    const llama_kv_cells & cells(int32_t seq_id) const { return kv.v_cells[stream_of(seq_id)]; }

    // K (part 0) or V of a layer in the stream of a sequence: [n_embd, n_cells]
    ggml_tensor * part(uint32_t ikv, int part, int32_t seq_id) const;
    ggml_tensor * k(uint32_t ikv, int32_t seq_id) const { return part(ikv, 0, seq_id); }
    ggml_tensor * v(uint32_t ikv, int32_t seq_id) const { return part(ikv, 1, seq_id); }
    laq_lanes     lanes(uint32_t ikv, int part) const;
    bool          in_host_memory() const;
    uint32_t      n_cells() const { return kv.v_cells[0].size(); }                   // of a stream
    uint32_t      n_used(int32_t seq_id) const { return cells(seq_id).get_used(); }  // in the stream of a sequence
    uint32_t      n_free(int32_t seq_id) const { return n_cells() - n_used(seq_id); }
    uint32_t      n_used() const;  // in all streams
    uint32_t      n_head_kv_max() const;

    // cells of a sequence in order of position, and how many
    std::vector<uint32_t> resident(int32_t seq_id) const;
    uint32_t              n_resident(int32_t seq_id) const;

    // 1 = no other sequence has the cell
    std::vector<uint8_t> owned(int32_t seq_id, const std::vector<uint32_t> & order) const;

    // A head is one of the n_heads KV heads of all layers.
    // positions that a head holds in the cells of a stream: [n_cells]; valid below the sequence's n_intact
    const int32_t * origin(uint32_t head, int32_t seq_id) const { return origins.data() + row(head, seq_id); }
    int32_t *       origin(uint32_t head, int32_t seq_id) { return origins.data() + row(head, seq_id); }

    // what those tokens scored when a probe last looked: mean over its queries, [n_cells]
    const float * memory(uint32_t head, int32_t seq_id) const { return memories.data() + row(head, seq_id); }
    float *       memory(uint32_t head, int32_t seq_id) { return memories.data() + row(head, seq_id); }

    // the position that a head holds in a cell
    int32_t pos_at(const laq_seq & seq, int32_t seq_id, uint32_t head, uint32_t cell) const;

    // The table after an eviction, without a change: the chosen tokens lie in the first of the sequence's own cells.
    // Their positions ascend below n_intact and depend on no score.
    laq_commit prepare(int32_t seq_id, const std::vector<uint32_t> & order, const std::vector<uint8_t> & own,
                       const laq_choice & choice, int32_t n_intact, uint32_t n_sink) const;

    // Take it over. own, order: as for prepare(); cells that are shared hold the same token in every head. Nothing
    // fails.
    void commit(int32_t seq_id, const laq_seq & before, const std::vector<uint32_t> & order,
                const std::vector<uint8_t> & own, const laq_choice & choice, laq_commit & done);

    // all tokens of a sequence, whatever their positions
    void remove(int32_t seq_id);

    // cells are taken in the order that they had
    void        rewind(int32_t seq_id) { kv.v_heads[stream_of(seq_id)] = 0; }
    uint64_t    kv_bytes() const;
    uint64_t    ring_bytes() const;
    std::string devices() const;  // that hold K and V, with blanks between them

    llama_kv_cache & kv;

  private:
    std::vector<int32_t> origins;   // [n_heads][n_stream][n_cells]
    std::vector<float>   memories;  // the same

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ring_bufs;

    size_t row(uint32_t head, int32_t seq_id) const {
        return ((size_t) head * kv.n_stream + stream_of(seq_id)) * n_cells();
    }
};
