#pragma once

// State of one attached context: which tokens its cells hold, the ring of captured queries, pending evictions.
// Internal to libllama; laq.h is the interface.

#include "laq-archive.h"
#include "laq-hooks.h"
#include "laq-policy.h"
#include "laq.h"

#include "ggml-cpp.h"
#include "llama-context.h"
#include "llama-kv-cache.h"

#include <array>
#include <cstdint>
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

struct laq_layer {
    int32_t  il;  // layer of the model
    uint32_t n_head;
    uint32_t n_head_kv;
    uint32_t n_embd_head_k;
    uint32_t n_embd_head_v;
    // F16 [n_ring, n_slots]: the query of a token, and where outputs are captured what attention gave for it
    ggml_tensor * ring = nullptr;

    int64_t n_ring_q() const { return (int64_t) n_embd_head_k * n_head; }

    int64_t n_ring_out() const { return (int64_t) n_embd_head_v * n_head; }

    // Where the cells hold different tokens in different heads: position that head h holds in a cell,
    // [n_head_kv][n_cells]. Valid where the cell table's position is below the n_intact of the cell's sequence.
    std::vector<int32_t> origin;

    // What those tokens scored when a probe last looked, mean over its queries: [n_head_kv][n_cells]. Valid where the
    // origin is, while the sequence remembers.
    std::vector<float> memory;

    // as the model's own attention has them, known once a graph was built
    float         kq_scale = 0.0f;
    float         softcap  = 0.0f;
    ggml_tensor * sinks    = nullptr;
    bool          has_bias = false;
    bool          fused    = false;  // the fused kernel scores its keys
};

// an eviction that waits for its lookahead queries
struct laq_pending {
    int32_t n_prompt;  // tokens before the first generated one
};

// Queries (and outputs) of one sequence: slot of position p is first + p % n.
struct laq_ring {
    uint32_t             first = 0;
    std::vector<int32_t> pos;    // [n] position of the query in each slot, -1 = none
    std::vector<uint8_t> exact;  // [n] 1 = its output is what it gets from all tokens, evicted ones included

    int32_t slot_of(int32_t p) const { return first + p % (int32_t) pos.size(); }

    // forget queries of positions >= p0
    void forget(int32_t p0);
};

// One sequence. Cells of positions below n_intact hold different tokens in different heads; from there on every head
// holds the token that the cell table names. Invariant: in order of the table's positions, those of a head ascend.
struct laq_seq {
    int32_t                    n_intact  = 0;
    int32_t                    n_settled = 0;  // outputs from here on are those of what the cells hold now
    std::optional<laq_pending> pending;
    std::vector<laq_span>      pinned;
    laq_ring                   ring;
    bool                       remembers = false;  // the last eviction was by a probe of the prompt that is being read
    bool                       in_parts  = false;  // the prompt that is being read did not fit: it is read twice
    bool                       fitted    = false;  // V of what is below n_intact may not be what the archive has of it
    bool                       attending = false;  // what is decoded now attends to the archive as well
    int32_t                    n_exact   = INT32_MAX;  // tokens from here on were decoded in view of the cells alone
};

// the part of a saved state that is ours, of one sequence
struct laq_saved {
    int32_t                           seq_id;
    uint32_t                          n_resident;
    int32_t                           n_intact;
    int32_t                           n_settled;
    std::optional<laq_pending>        pending;
    bool                              remembers;
    bool                              in_parts;
    bool                              fitted;
    int32_t                           n_exact;
    bool                              attending;
    std::vector<int32_t>              ring_pos;
    std::vector<uint8_t>              ring_exact;
    std::vector<std::vector<int32_t>> origin;  // per KV layer [n_head_kv][n_mixed], in order of the table's positions
    std::vector<std::vector<float>>   memory;  // the same; empty if the sequence does not remember
    bool                              has_outputs = true;
    std::vector<laq_archive_image>    archive;
    bool                              has_archive;
};

// a token that one head may hold
struct laq_row {
    int32_t pos;
    int32_t cell;  // -1 = it is in the archive alone
};

// what every head is to hold, in order of position: per KV layer and KV head, all of one length
using laq_rows = std::vector<std::vector<std::vector<laq_row>>>;

// indices into a list of cells in order of position, per KV layer and KV head, all of one length
using laq_kept = std::vector<std::vector<std::vector<uint32_t>>>;

// what captured queries attend to: per KV layer [n_head_kv][cells asked for]; empty if no query was held
struct laq_scores {
    std::vector<std::vector<float>> rows;
    uint32_t                        n_queries = 0;
};

// what one eviction does
struct laq_eviction {
    int32_t         seq_id;
    uint32_t        n_keep;                    // tokens per layer and KV head
    laq_query_range queries;                   // positions whose captured queries score; none: the newest stay
    bool            scratch;                   // they are in the scratch ring
    int32_t         n_intact;                  // positions from here on are kept whole
    int32_t         n_end;                     // tokens from here on are dropped
    bool            recall = false;            // archived tokens may come back
    bool            always = false;            // also where hardly anything would be new
    uint32_t        n_fit  = LAQ_FIT_QUERIES;  // values are fitted to the last ones of the queries, at most so many
};

// a captured query and where it is
struct laq_observation {
    int32_t slot;
    int32_t pos;
    bool    exact;  // as laq_ring has it
};

// Those that the eviction asks for and that are held.
std::vector<laq_observation> laq_observations(const laq_cache & laq, const laq_eviction & e);

// the last ones of many: what a fit costs grows with their square
std::vector<laq_observation> laq_last_fitted(std::vector<laq_observation> obs, uint32_t n_fit);
// Whether the ring has what they get from all tokens: the model's own attention gave it.
bool laq_all_exact(const std::vector<laq_observation> & obs);

// what a token scores now, mean over the queries, with what it scored when a probe last looked
inline float laq_joined(float now, float before) {
    return (now + before) * 0.5f;
}

// indices into view of what stays of one head, n_shared cells of other sequences aside
std::vector<uint32_t> laq_keep_of_head(const laq_params & params, uint32_t ikv, uint32_t h, const laq_head_view & view,
                                       uint32_t n_shared);

// what is in the cells of a sequence, as a saved state without the archive; throws laq_error
std::vector<uint8_t> laq_state_of_cells(laq_cache & laq, int32_t seq_id);

struct laq_recall_state;

struct laq_cache {
    llama_context *  ctx;
    llama_kv_cache * kv;

    laq_params            params;
    std::vector<laq_span> pinned;
    uint32_t              n_ctx;  // positions that a sequence may have

    std::vector<laq_layer> layers;   // in the order of the KV cache
    std::vector<laq_seq>   seqs;     // [n_seq_max]
    laq_ring               scratch;  // queries of a probe, which is not to overwrite those of its sequence
    uint32_t               n_slots;  // of the rings; the last one takes what nobody wants

    bool                   probing = false;     // what is decoded now goes to the scratch ring
    std::function<void()>  job;                 // what the next update does
    uint32_t               n_wanted = 0;        // tokens that found no cells
    std::vector<laq_saved> saved;               // a state being read, taken over when its cells are there
    bool                   keep_rings = false;  // a state being read leaves the captured queries as they are

    bool        can_score      = false;  // what scoring needs was allocated
    bool        can_attend     = false;  // the same for attention to the archive
    uint32_t    n_attend       = 0;      // most tokens that attend to it at once
    bool        attends_memory = false;  // only to one that is in memory: what a device masks cannot change on the way
    bool        reserving      = false;  // the graph that is built is the largest one that does
    bool        by_graph       = false;  // K and V are moved by a graph on their device
    std::string devices;                 // as laq_stats has them
    std::string score_reason;
    std::string compact_reason;

    const bool captures_outputs;  // what attention gave for each query lies behind it in the ring
    bool       debug;             // env: LAQ_DEBUG, keep the scores of the last evictions

    static constexpr uint32_t N_DEBUG = 8;

    // of eviction i of stats.n_evictions in i % N_DEBUG, per KV layer: [n_head_kv][n_kv]
    std::array<std::vector<std::vector<float>>, N_DEBUG> scores;

    std::unique_ptr<laq_recall_state> recall;               // null: what leaves the cells is gone
    bool                              save_archive = true;  // states carry it

    std::vector<std::unique_ptr<laq_parked>> parked;  // sequences outside of the cells

    laq_stats   stats  = {};
    laq_status  status = LAQ_STATUS_OK;  // of the last update
    std::string error;

    laq_cache(llama_context * ctx, const laq_params & params);
    ~laq_cache();

    laq_cache(const laq_cache &)             = delete;
    laq_cache & operator=(const laq_cache &) = delete;

    // throws laq_error if the layers of the context's cache cannot be evicted one by one
    static void check_layers(const llama_context & ctx);

    // allocate what evictions compute with; nothing is allocated after that
    void reserve();

    // parameters in place of those before, which the caller has checked
    void set_params(const laq_params & p);

    // the parameters with the pinned spans of a sequence
    laq_params params_of(int32_t seq_id) const;

    const llama_kv_cells & cells() const;
    ggml_tensor *          k(uint32_t ikv) const;
    ggml_tensor *          v(uint32_t ikv) const;
    bool                   v_trans() const;  // a row of V is a channel of all cells, not a cell

    // cells in use by a sequence, ordered by position
    std::vector<uint32_t> resident(int32_t seq_id) const;
    uint32_t              n_resident(int32_t seq_id) const;
    uint32_t              n_used() const;
    uint32_t              n_cells() const;
    int32_t               n_tokens(int32_t seq_id) const;  // last position + 1
    int                   n_threads() const;               // of what the host does between graphs
    uint32_t              n_head_kv_max() const;

    // position that head `h` of KV layer `ikv` holds in a cell of a sequence
    int32_t pos_at(int32_t seq_id, uint32_t ikv, uint32_t h, uint32_t cell) const;

    // queries in n slots of a ring, from the backend's memory: F32 [n][n_head][n_embd_head_k]
    std::vector<float> queries(uint32_t ikv, int32_t slot, uint32_t n) const;

    // the output that a query in a slot is taken to have got: [n_head][n_embd_head_v]
    void set_output(uint32_t ikv, int32_t slot, const std::vector<float> & out) const;

    uint64_t kv_bytes() const;
    uint64_t ring_bytes() const;
    uint64_t compute_bytes() const;

    // Score, select, compact, fit: as part of an update of the memory. Throws laq_error and changes nothing if it fails.
    void evict(const laq_eviction & e);

    // Choose from archived and resident tokens together, or do nothing. Returns whether anything came back
    bool choose_again(const laq_eviction & e);

    // the attention of captured queries to the cells of `order`
    laq_scores score(const laq_eviction & e, const std::vector<uint32_t> & order);

    // run the job, or what the hooks ask for, as an update of the context's memory; throws what went wrong
    void run_update(std::function<void()> job);

    // an eviction whose lookahead is complete
    bool can_evict(int32_t seq_id) const;
    void evict_pending(int32_t seq_id, laq_recall_when when = LAQ_RECALL_TURN);

    // whether it is time to choose again, and there is something to choose from
    bool may_recall(int32_t seq_id, laq_recall_when when) const;
    bool recalls(int32_t seq_id, laq_recall_when when) const;

    // where the intact suffix begins after an eviction whose window ends at n_prompt
    int32_t intact_from(int32_t seq_id, int32_t n_prompt) const;

    // the same after a probe, when n_past tokens of the prompt have been read and n_keep stay
    int32_t intact_in_prompt(int32_t seq_id, int32_t n_past, uint32_t n_keep) const;

    // Whether values are fitted to what queries get from the archive and the cells together: where the host, which has
    // the archive, is what scores it. Otherwise to what they got from the cells.
    bool fits_to_archive() const;

    // whether the archive has to be looked at for that: the cells of order do not hold all of it
    bool observes_archive(int32_t seq_id, const std::vector<uint32_t> & order) const;

    // down to n_keep with the queries of the last tokens
    void evict_to(int32_t seq_id, uint32_t n_keep, bool recall = false);

    // down to the budget, since tokens that are generated find no cells
    void overflow(int32_t seq_id);

    // Cells for n_wanted more tokens: sequences above the budget come down to it. false = there are none to be had
    bool can_make_room() const;
    void make_room();

    // a sequence is gone
    void reset(int32_t seq_id);

    // Take a sequence out of the cells; put one back into a sequence without tokens. Throw laq_error and change nothing
    // if they fail.
    laq_parked & park(int32_t seq_id);
    void         resume(int32_t seq_id, laq_parked & p);

    // Whether the graph of a ubatch attends to the archive as well, and to how many columns: one for each position.
    bool     attends(const llama_ubatch & ubatch) const;
    uint32_t n_attended_to() const;

    // Whether a prompt can be read in view of the archive: it has all that left the cells.
    bool may_attend(int32_t seq_id) const;

    // rows of the ring tensors that the rows of a ubatch go to, and which of its last rows are captured
    uint32_t n_captured(uint32_t n_tokens) const;
    void     capture(const llama_ubatch & ubatch, uint32_t n, int64_t * slots);

  private:
    using buffers = std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>>;

    buffers  ring_bufs;
    uint32_t n_ctx_own;  // llama_context's own n_ctx_seq, put back when detached

    void init_layers();
    void init_rings();

    // order: all cells of the sequence; own: 1 = no other sequence shares it. Of the rest, nothing moves.
    laq_kept select(const laq_eviction & e, const std::vector<uint32_t> & order, const std::vector<uint8_t> & own,
                    const laq_scores & scores);

    void settle_shared(int32_t seq_id, const std::vector<uint32_t> & order, const std::vector<uint8_t> & own);

    // The cells that hold the rows afterwards, archived ones still to be written; all others of the sequence's own become
    // free.
    std::vector<uint32_t> compact(const laq_eviction & e, const std::vector<uint32_t> & order,
                                  const std::vector<uint8_t> & own, const laq_rows & rows);

    // the cells `dst` hold what was kept: each head remembers what it scored
    void memorize(const std::vector<uint32_t> & dst, const laq_kept & kept, const laq_scores & now);

    // those from n_kept on become free
    void drop(std::vector<uint32_t> & cells, uint32_t n_kept);

    // V of what stays is fitted to the outputs that the queries had; ahead of it all that they see is in the cells `dst`
    void fit_values(const laq_eviction & e, const std::vector<laq_observation> & obs,
                    const std::vector<uint32_t> & dst);

    // The queries that V of what stays is fitted to: their outputs are in the ring. Empty where nothing is fitted.
    std::vector<laq_observation> fitted_to(const laq_eviction & e, const std::vector<uint32_t> & order);

    // what the queries get from archived and resident tokens together goes to the ring
    void observe_archive(const laq_eviction & e, const std::vector<uint32_t> & order,
                         const std::vector<laq_observation> & obs);

    // Choose from archived and resident tokens together. false = nothing was changed, evict as without an archive
    bool reselect(const laq_eviction & e, const std::vector<uint32_t> & order, const std::vector<uint8_t> & own);

    // what the cells of `order` scored when a probe looked before joined to what they score now
    void remember(int32_t seq_id, const std::vector<uint32_t> & order, laq_scores & now) const;
};
