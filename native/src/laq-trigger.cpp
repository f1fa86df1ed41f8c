#include "laq-trigger.h"

#include <algorithm>

bool laq_is_due(const laq_context & laq, int32_t seq_id) {
    const laq_phase & phase = laq.seqs[seq_id].phase;
    return phase.is(laq_phase::WAITING) && laq.n_tokens(seq_id) >= phase.n_prompt + (int32_t) laq.params.n_lookahead;
}

void laq_evict_waiting(laq_context & laq, int32_t seq_id) {
    const int32_t n_end = laq.n_tokens(seq_id);
    // no more than n_lookahead tokens are ahead, or the window would not fit the budget
    const int32_t n_prompt = std::max(laq.seqs[seq_id].phase.n_prompt, n_end - (int32_t) laq.params.n_lookahead);
    const bool    recall   = laq.has_archived(seq_id);
    if (laq.n_over(seq_id) > 0 || recall) {
        laq_plan plan = { seq_id, laq.params.n_kv_budget, laq.intact_from(seq_id, n_prompt), n_end };
        plan.queries  = laq_policy_queries(laq.params, n_prompt, n_end);
        plan.recall   = recall;
        laq_carry_out(laq, plan);
    }
    laq.seqs[seq_id].phase = {};
}

void laq_evict_to(laq_context & laq, int32_t seq_id, uint32_t n_keep, bool recall) {
    const int32_t n_end    = laq.n_tokens(seq_id);
    const int32_t n_prompt = std::max(0, n_end - (int32_t) laq_policy_ahead(laq.params));

    laq_plan plan = { seq_id, n_keep, laq.intact_from(seq_id, n_prompt), n_end };
    plan.queries  = laq_policy_queries(laq.params, n_prompt, n_end);
    plan.recall   = recall && laq.has_archived(seq_id);
    laq_carry_out(laq, plan);
    if (laq.seqs[seq_id].phase.is(laq_phase::WAITING)) {
        laq.seqs[seq_id].phase = {};
    }
}

// cells that an eviction of a sequence frees for tokens that are wanted
static uint32_t n_to_be_had(const laq_context & laq, const laq_wanted & wanted, int32_t s) {
    const bool may = !laq.seqs[s].phase.is(laq_phase::READING) || wanted.of_seq[s] > 0;
    if (!may || laq.n_over(s) == 0) {
        return 0;
    }
    // cells that are shared stay
    const std::vector<uint8_t> own      = laq.store.owned(s, laq.store.resident(s));
    const uint32_t             n_shared = std::count(own.begin(), own.end(), 0);
    const bool fits = n_shared == 0 || n_shared + laq_policy_n_pinned(laq.params_of(s)) <= laq.params.n_kv_budget;
    return fits ? laq.n_over(s) : 0;
}

// in one stream, whose sequences are given
static bool make_room(laq_context & laq, const laq_wanted & wanted, const std::vector<int32_t> & seqs,
                      uint32_t n_wanted) {
    const auto enough = [&](uint32_t n_more) { return laq.store.n_free(seqs[0]) + n_more >= n_wanted; };
    if (enough(0)) {
        return true;
    }
    std::vector<std::pair<uint32_t, int32_t>> over;  // cells to be had, of whom
    uint32_t                                  n_over = 0;
    for (const int32_t s : seqs) {
        over.emplace_back(n_to_be_had(laq, wanted, s), s);
        n_over += over.back().first;
    }
    std::stable_sort(over.begin(), over.end(), [](const auto & a, const auto & b) { return a.first > b.first; });
    for (auto it = over.begin(); enough(n_over) && !enough(0) && it != over.end(); ++it) {
        const int32_t s = it->second;
        n_over -= it->first;
        // an eviction that waits is the turn's own
        const bool recall = laq.seqs[s].phase.is(laq_phase::WAITING) || laq.params.recall == LAQ_RECALL_ALWAYS;
        laq_evict_to(laq, s, laq.params.n_kv_budget, recall);
    }
    return enough(0);
}

bool laq_make_room(laq_context & laq, const laq_wanted & wanted) {
    bool res = true;
    for (uint32_t stream = 0; res && stream < laq.store.kv.get_n_stream(); ++stream) {
        std::vector<int32_t> seqs;
        uint32_t             n_wanted = laq.store.unified() ? wanted.of_others : 0;
        for (int32_t s = 0; s < (int32_t) laq.seqs.size(); ++s) {
            if (laq.store.stream_of(s) == stream) {
                seqs.push_back(s);
                n_wanted += wanted.of_seq[s];
            }
        }
        res = seqs.empty() || make_room(laq, wanted, seqs, n_wanted);
    }
    return res;
}
