// Hooks of the KV cache. Those of graphs are in laq-hooks-graph.cpp, those of states in laq-state.cpp.

#include "laq-hooks.h"

#include "laq-api.h"
#include "laq-trigger.h"

#include "llama-batch.h"
#include "llama-impl.h"

#include <algorithm>

void laq_kv_clear(laq_context & laq) {
    for (uint32_t s = 0; s < laq.seqs.size(); ++s) {
        laq.reset(s);
    }
}

//
// removals and copies
//

bool laq_kv_seq_rm(laq_context & laq, int32_t seq_id, int32_t p0, int32_t p1) {
    const int32_t n_seqs = laq.seqs.size();
    const auto    loses  = [&](int32_t s) { return (seq_id < 0 || s == seq_id) && p0 < std::min(p1, laq.n_tokens(s)); };
    const auto    goes   = [&](int32_t s) { return p0 == 0 && p1 >= laq.n_tokens(s); };
    for (int32_t s = 0; s < n_seqs; ++s) {
        if (loses(s) && !goes(s) && p0 < laq.seqs[s].n_intact) {
            LLAMA_LOG_DEBUG("%s: positions below %d of sequence %d have been evicted, [%d, %d) cannot be removed\n",
                            __func__, laq.seqs[s].n_intact, s, p0, p1);
            return false;
        }
    }
    for (int32_t s = 0; s < n_seqs; ++s) {
        if (loses(s) && goes(s)) {
            laq.reset(s);
        } else if (loses(s)) {
            laq.seqs[s].removed(p0);
            if (laq.archive_of(s)) {
                laq.archive_of(s)->forget(p0);
            }
        }
    }
    return true;
}

bool laq_kv_seq_cp(const laq_context & laq, int32_t src, int32_t dst) {
    if (!laq_kv_evicted(laq, src) && !laq_kv_evicted(laq, dst)) {
        return true;
    }
    LLAMA_LOG_ERROR("%s: sequence %d or %d has been evicted: its cells hold tokens of different positions and are not "
                    "shared. Copy before the eviction, or save and load the state\n",
                    __func__, src, dst);
    return false;
}

void laq_kv_seq_copied(laq_context & laq, int32_t dst) {
    laq.reset(dst);
    laq.ctx->memory_update(false);
}

void laq_kv_seq_keep(laq_context & laq, int32_t seq_id) {
    for (int32_t s = 0; s < (int32_t) laq.seqs.size(); ++s) {
        if (s != seq_id) {
            laq.reset(s);
        }
    }
}

bool laq_kv_refuse(const laq_context &, const char * what) {
    LLAMA_LOG_ERROR("%s: not possible with kv_budget: cells hold tokens of different positions of one sequence\n",
                    what);
    return true;
}

bool laq_kv_evicted(const laq_context & laq, int32_t seq_id) {
    return seq_id >= 0 && seq_id < (int32_t) laq.seqs.size() && laq.seqs[seq_id].n_intact > 0;
}

int32_t laq_kv_pos_min(const laq_context & laq, int32_t seq_id) {
    return laq.seqs[seq_id].n_intact - 1;
}

//
// before a batch is decoded
//

// llama_decode() returns 1 for what goes wrong here, and laq_last_error() says what.
template <typename F> static bool guarded(F && f) {
    if (laq_guarded(f) == LAQ_STATUS_OK) {
        return true;
    }
    LLAMA_LOG_ERROR("llama_decode: %s\n", laq_last_error());
    return false;
}

// tokens that attend are of one sequence and not too many
static void check_ubatch(const laq_context & laq, const llama_ubatch & ubatch) {
    int32_t s     = -1;
    bool    mixed = false;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const int32_t seq_id = ubatch.seq_id[i][0];
        mixed |= seq_id != ubatch.seq_id[0][0] || ubatch.n_seq_id[i] > 1;
        s = seq_id < (int32_t) laq.seqs.size() && laq.attends(seq_id) ? seq_id : s;
    }
    const std::string who = "tokens of sequence " + std::to_string(s) + " attend to its archive: ";
    laq_check(s < 0 || !mixed || laq.now.probing, who + "decode them in a batch of their own");
    laq_check(s < 0 || ubatch.n_tokens <= laq.facts.n_attend,
              who + "decode as many as laq_prompt_next() says, at most " + std::to_string(laq.facts.n_attend));
}

bool laq_kv_prepare(laq_context & laq, const std::vector<llama_ubatch> & ubatches) {
    // llama_decode() may only say that there are no cells: the reason is found here
    laq_set_last_error("");
    return guarded([&] {
        for (int32_t s = 0; s < (int32_t) laq.seqs.size(); ++s) {
            if (laq_is_due(laq, s)) {
                laq_evict_waiting(laq, s);
            }
        }
        for (const llama_ubatch & ubatch : ubatches) {
            check_ubatch(laq, ubatch);
        }
    });
}

bool laq_kv_make_room(laq_context & laq, const std::vector<llama_ubatch> & ubatches) {
    laq_wanted wanted = { std::vector<uint32_t>(laq.seqs.size()) };
    for (const llama_ubatch & ubatch : ubatches) {
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            const int32_t seq_id = ubatch.seq_id[i][0];
            ++(seq_id < (int32_t) laq.seqs.size() ? wanted.of_seq[seq_id] : wanted.of_others);
        }
    }
    bool done = false;
    return guarded([&] {
               const uint32_t n_before = laq.stats.n_evictions;
               done                    = laq_make_room(laq, wanted) && laq.stats.n_evictions > n_before;
           }) &&
           done;
}
