#pragma once

// State of one attached context: which tokens its cells hold, the ring of captured queries, the pending eviction.
// Internal to libllama; laq.h is the interface.

#include "laq-hooks.h"
#include "laq-policy.h"
#include "laq.h"

#include "ggml-cpp.h"
#include "llama-context.h"
#include "llama-kv-cache.h"

#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

// what a C function returns, thrown inside the library only
struct laq_error : std::runtime_error {
    laq_status status;

    laq_error(laq_status status, const std::string & what) : std::runtime_error(what), status(status) {}
};

// Which token each KV head holds in each cell. Cells [0, n_mixed) differ between heads; from there on every head
// holds the token that the cell table names, and that token's position is >= n_intact.
// Invariant: origins of a head are ascending, and cells [0, n_mixed) are all in use while n_mixed > 0.
struct laq_origin {
    uint32_t n_mixed  = 0;
    int32_t  n_intact = 0;

    std::vector<std::vector<int32_t>> pos;  // per KV layer: [n_head_kv][n_mixed]
};

using laq_buffers = std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>>;

struct laq_kv_tensors {
    ggml_tensor * k;
    ggml_tensor * v;
    ggml_tensor * k_stream;  // views of the one stream
    ggml_tensor * v_stream;
};

// K and V of all layers in their buffers, with the table of the cells
struct laq_storage {
    laq_buffers                 ctxs_bufs;
    std::vector<laq_kv_tensors> layers;
    llama_kv_cells              cells;
    uint32_t                    head = 0;
    laq_origin                  origin;
};

// indices into the resident cells in order of position, per KV layer and KV head; empty = all of them
using laq_kept = std::vector<std::vector<std::vector<uint32_t>>>;

struct laq_layer {
    int32_t       il;  // layer of the model
    uint32_t      n_head;
    uint32_t      n_head_kv;
    uint32_t      n_embd_head_k;
    uint32_t      n_embd_head_v;
    ggml_tensor * ring = nullptr;  // F32 [n_embd_head_k*n_head, n_ring]

    // as the model's own attention has them, known once a graph was built
    float         kq_scale = 0.0f;
    float         softcap  = 0.0f;
    ggml_tensor * sinks    = nullptr;
    bool          has_bias = false;
};

// an eviction that waits for its lookahead queries
struct laq_pending {
    int32_t n_prompt;  // tokens before the first generated one
};

// the part of a saved state that is ours
struct laq_saved {
    laq_origin                 origin;
    std::optional<laq_pending> pending;
    std::vector<int32_t>       ring_pos;
};

struct laq_cache {
    llama_context *  ctx;
    llama_kv_cache * kv;

    laq_params            params;
    std::vector<laq_span> pinned;
    uint32_t              n_ring;       // queries kept per layer
    uint32_t              n_cells_max;  // cells of the context: n_ctx

    std::vector<laq_layer> layers;    // in the order of the KV cache
    std::vector<int32_t>   ring_pos;  // [n_ring] position of the query in each slot, -1 = none
    laq_origin             origin;

    std::optional<laq_pending> pending;
    std::function<void()>      job;         // what the next update does
    uint32_t                   n_grow = 0;  // tokens that found no cells
    std::unique_ptr<laq_saved> saved;       // a state being read, taken over when the cells have been cleared

    bool                            debug;   // env: LAQ_DEBUG, keep the scores of the last eviction
    std::vector<std::vector<float>> scores;  // per KV layer: [n_head_kv][n_kv]

    laq_stats   stats  = {};
    laq_status  status = LAQ_STATUS_OK;  // of the last update
    std::string error;

    laq_cache(llama_context * ctx, const laq_params & params);
    ~laq_cache();

    laq_cache(const laq_cache &)             = delete;
    laq_cache & operator=(const laq_cache &) = delete;

    // throws laq_error if the layers of the context's cache cannot be evicted one by one
    static void check_layers(const llama_context & ctx);

    // cells in use, ordered by position
    std::vector<uint32_t> resident() const;
    uint32_t              n_resident() const;
    uint32_t              n_cells() const;
    int32_t               n_tokens() const;  // last position + 1
    uint32_t              n_head_kv_max() const;

    const llama_kv_cells & cells() const;
    ggml_tensor *          k(uint32_t ikv) const;

    // position that head `h` of KV layer `ikv` holds in a cell
    int32_t pos_at(uint32_t ikv, uint32_t h, uint32_t cell) const;

    uint64_t kv_bytes() const;
    uint64_t ring_bytes() const;

    // Move the kept tokens into newly allocated cells; returns what they were in. All heads keep the same number.
    // Throws laq_error and changes nothing if the cells cannot be allocated.
    laq_storage rebuild(uint32_t n_cells, const laq_kept & kept, int32_t n_intact);

    void swap_storage(laq_storage & other);

    // Score and select with the given parameters; tokens from position n_end on are not kept, and those from
    // *n_intact (set here) to there are kept whole.
    laq_kept select(const laq_params & p, int32_t n_prompt, int32_t n_end, int32_t * n_intact);

    // Select and compact. n_prompt: tokens before the lookahead; n_end: as for select.
    void evict(int32_t n_prompt, int32_t n_end);

    // The attention of the captured queries of positions [first, last) to the cells of `order`:
    // per KV layer [n_head_kv][order.size()]
    std::vector<std::vector<float>> score(laq_query_range range, const std::vector<uint32_t> & order);

    // rows of the ring that hold positions [first, last), in order
    std::vector<int32_t> ring_slots(laq_query_range range) const;

    // forget queries of positions >= p0
    void forget_queries(int32_t p0);

    // run the job, or what the hooks ask for, as an update of the context's memory; throws what went wrong
    void run_update(std::function<void()> job);

    // what the next update would do by itself: an eviction that has its lookahead, or cells for n_grow tokens
    bool can_evict() const;
    void evict_pending();

    // the cells have been cleared
    void reset();

  private:
    laq_buffers ring_bufs;

    void        init_layers();
    void        init_ring();
    laq_storage allocate(uint32_t n_cells) const;
    void        move_layer(uint32_t ikv, const laq_storage & dst, const std::vector<uint32_t> & order,
                           const laq_kept & kept) const;
    void        fill_cells(laq_storage & dst, const std::vector<uint32_t> & order, const laq_kept & kept,
                           int32_t n_intact) const;
};

// smallest number of cells that llama.cpp allocates for n tokens
uint32_t laq_pad_cells(uint32_t n_tokens, uint32_t n_cells_max);
