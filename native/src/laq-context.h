#pragma once

// What one attached context owns. What is done with it is in laq-evict, laq-recall, laq-trigger and laq-read.

#include "laq-archive.h"
#include "laq-compute.h"
#include "laq-error.h"
#include "laq-graph-score.h"
#include "laq-policy.h"
#include "laq-saved.h"
#include "laq-seq.h"
#include "laq-store.h"

#include "llama-context.h"

#include <array>
#include <memory>
#include <string>
#include <vector>

// what is decided when a context is attached and stays so
struct laq_facts {
    bool with_outputs;      // outputs are captured beside queries
    bool by_graph;          // rows are moved by a graph on their device
    bool ahead_from_cells;  // a lookahead sees the cells alone: they are on a device, or there are several sequences
    bool can_score;         // the policy of laq_attach() needs queries
    bool debug;             // env: LAQ_DEBUG, scores of the last evictions are kept
    std::string devices;    // that hold K and V, with blanks between them
    uint32_t    n_attend;   // most tokens that attend at once
    uint32_t    n_slots;    // of the rings; the last one takes what nobody wants
    uint32_t    n_ctx_own;  // llama_context's own n_ctx_seq, put back by laq_detach()
};

// what is going on during a call
struct laq_now {
    bool probing   = false;  // what is decoded goes to the ring of probes
    bool reserving = false;  // the graph that is built is the largest one that attends
    bool sampling  = false;  // backend samplers are set: raw logits are not to be had
    bool archives  = true;   // saved states carry the archive
};

// a flag of laq_now for the rest of a block
struct laq_during {
    bool &     flag;
    const bool before;
    laq_during(bool & flag, bool value) : flag(flag), before(flag) { flag = value; }
    ~laq_during() { flag = before; }
};

// scores of an eviction: [n_heads][n]
struct laq_scores {
    std::vector<float> rows;
    size_t             n         = 0;
    uint32_t           n_queries = 0;
};

struct laq_context {
    llama_context *       ctx;
    laq_params            params;
    std::vector<laq_span> pinned;  // what params.pinned points to
    uint32_t              n_ctx;   // positions that a sequence may have
    laq_facts             facts;

    laq_store   store;
    laq_compute compute;

    std::vector<laq_seq>                      seqs;      // [n_seq_max]
    std::vector<std::unique_ptr<laq_archive>> archives;  // [n_seq_max], or null
    laq_ring                                  scratch;   // queries of a probe

    std::vector<std::unique_ptr<laq_parked>> parked;
    std::vector<laq_saved>                   saved;  // a state that is being read, until its cells are there

    laq_now   now;
    laq_stats stats = {};

    static constexpr uint32_t N_DEBUG = 8;

    std::array<laq_scores, N_DEBUG> scores;  // of eviction i of stats.n_evictions in i % N_DEBUG

    // throws laq_error
    laq_context(llama_context * ctx, const laq_params & params);
    ~laq_context();

    laq_context(const laq_context &)             = delete;
    laq_context & operator=(const laq_context &) = delete;

    // Other parameters, which the caller has checked. Buffers grow if they need larger ones; throws laq_error.
    void set_params(const laq_params & p);

    // the parameters with the pinned spans of a sequence
    laq_params    params_of(int32_t seq_id) const;
    laq_archive * archive_of(int32_t seq_id) const { return archives[seq_id].get(); }
    bool          has_archived(int32_t seq_id) const { return archives[seq_id] && archives[seq_id]->n_held() > 0; }
    int32_t       n_tokens(int32_t seq_id) const;  // last position + 1
    uint32_t      n_resident(int32_t seq_id) const { return store.n_resident(seq_id); }
    uint32_t      n_over(int32_t seq_id) const;  // cells that an eviction to the budget frees
    uint32_t      n_room(int32_t seq_id) const;  // cells that a sequence can have
    int           n_threads() const { return ctx->get_cparams().n_threads_batch; }

    // whether the next tokens of a sequence attend
    bool attends(int32_t seq_id) const;

    // where the intact suffix begins after an eviction whose window ends at n_prompt
    int32_t intact_from(int32_t seq_id, int32_t n_prompt) const;

    // captured queries of the positions asked for: of a probe or of the sequence
    std::vector<laq_observed> observed(int32_t seq_id, const laq_query_range & queries, bool by_probe) const;

    // a sequence is gone
    void reset(int32_t seq_id);

    // let the buffers of evictions be large enough; throws laq_error
    void reserve();

    uint64_t compute_bytes() const;

  private:
    void init_rings();
    void init_archives();
};
