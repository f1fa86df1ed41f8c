// What llama.cpp calls, see laq-hooks.h.

#include "laq-api.h"
#include "laq-cache.h"
#include "laq-recall.h"

#include "ggml-backend.h"
#include "llama-impl.h"

#include <algorithm>

void laq_kv_clear(laq_cache & laq) {
    for (uint32_t s = 0; s < laq.seqs.size(); ++s) {
        laq.reset(s);
    }
}

// what a removal does to one sequence: nothing, all of it goes, the end of its intact suffix goes, or it is refused
enum class removal { NONE, ALL, SUFFIX, REFUSED };

static removal removal_of(const laq_cache & laq, int32_t s, int32_t p0, int32_t p1) {
    const int32_t n_tokens = laq.n_tokens(s);
    if (p0 >= std::min(p1, n_tokens)) {
        return removal::NONE;
    }
    if (p0 == 0 && p1 >= n_tokens) {
        return removal::ALL;
    }
    return p0 < laq.seqs[s].n_intact ? removal::REFUSED : removal::SUFFIX;
}

bool laq_kv_seq_rm(laq_cache & laq, int32_t seq_id, int32_t p0, int32_t p1) {
    const int32_t n_seqs = laq.seqs.size();
    const int32_t first  = seq_id < 0 ? 0 : seq_id;
    const int32_t last   = seq_id < 0 ? n_seqs : std::min(seq_id + 1, n_seqs);
    for (int32_t s = first; s < last; ++s) {
        if (removal_of(laq, s, p0, p1) == removal::REFUSED) {
            LLAMA_LOG_DEBUG("%s: positions below %d of sequence %d have been evicted, [%d, %d) cannot be removed\n",
                            __func__, laq.seqs[s].n_intact, s, p0, p1);
            return false;
        }
    }
    for (int32_t s = first; s < last; ++s) {
        laq_seq & seq = laq.seqs[s];
        switch (removal_of(laq, s, p0, p1)) {
            case removal::ALL: laq.reset(s); break;
            case removal::SUFFIX:
                seq.ring.forget(p0);
                seq.n_settled = std::min(seq.n_settled, p0);
                seq.n_exact   = p0 <= seq.n_exact ? INT32_MAX : seq.n_exact;
                seq.remembers = false;
                if (laq.recall) {
                    laq.recall->archive.forget(p0);
                    laq.recall->forget(p0);
                }
                if (seq.pending && p0 < seq.pending->n_prompt) {
                    seq.pending.reset();
                }
                break;
            default: break;
        }
    }
    return true;
}

bool laq_kv_seq_cp(const laq_cache & laq, int32_t src, int32_t dst) {
    const auto evicted = [&](int32_t s) { return s < (int32_t) laq.seqs.size() && laq.seqs[s].n_intact > 0; };
    if (!evicted(src) && !evicted(dst)) {
        return true;
    }
    LLAMA_LOG_ERROR("%s: sequence %d or %d has been evicted: its cells hold tokens of different positions and are not "
                    "shared. Copy before the eviction, or save and load the state\n",
                    __func__, src, dst);
    return false;
}

void laq_kv_seq_keep(laq_cache & laq, int32_t seq_id) {
    for (int32_t s = 0; s < (int32_t) laq.seqs.size(); ++s) {
        if (s != seq_id) {
            laq.reset(s);
        }
    }
}

bool laq_kv_refuse(const laq_cache &, const char * what) {
    LLAMA_LOG_ERROR("%s: not possible with kv_budget: cells hold tokens of different positions of one sequence\n",
                    what);
    return true;
}

uint32_t laq_kv_pad(const laq_cache & laq) {
    // The CPU gives each thread an equal share of the cells, empty ones included, and those at the end cost nothing:
    // on a small cache upstream's 256 leave half of the threads idle. As upstream as long as nothing was evicted.
    const bool evicted =
        std::any_of(laq.seqs.begin(), laq.seqs.end(), [](const laq_seq & s) { return s.n_intact > 0; });
    return evicted && ggml_backend_buffer_is_host(laq.k(0)->buffer) ? 32 : 256;
}

void laq_kv_no_slot(laq_cache & laq, uint32_t n_tokens) {
    laq.n_wanted = n_tokens;
    // llama_decode() will only say that there are no cells: the reason is found here
    laq_set_last_error("");
}

bool laq_kv_has_update(laq_cache & laq, bool optimize) {
    if (optimize) {
        laq.n_wanted = laq.can_make_room() ? laq.n_wanted : 0;
        return laq.n_wanted > 0;
    }
    if (laq.job) {
        return true;
    }
    for (uint32_t s = 0; s < laq.seqs.size(); ++s) {
        if (laq.can_evict(s)) {
            return true;
        }
    }
    return false;
}

bool laq_kv_update(laq_cache & laq) {
    laq.status = LAQ_STATUS_OK;
    try {
        if (laq.job) {
            laq.job();
        } else if (laq.n_wanted > 0) {
            laq.make_room();
        } else {
            for (uint32_t s = 0; s < laq.seqs.size(); ++s) {
                if (laq.can_evict(s)) {
                    laq.evict_pending(s);
                }
            }
        }
    } catch (const laq_error & e) {
        laq.status = e.status;
        laq.error  = e.what();
    } catch (const std::exception & e) {
        laq.status = LAQ_STATUS_INTERNAL;
        laq.error  = e.what();
    }
    laq.n_wanted = 0;
    if (laq.status != LAQ_STATUS_OK) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, laq.error.c_str());
        laq_set_last_error(laq.error);
    }
    return laq.status == LAQ_STATUS_OK;
}
