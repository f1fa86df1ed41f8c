#include "laq-read.h"

#include "llama-model.h"

#include <algorithm>

//
// decoding
//

// Backend samplers take the raw logits, and would see tokens that are dropped again.
static void check_logits(laq_context & laq) {
    laq.ctx->sched_reserve();  // it says whether there are samplers
    laq_check(!laq.now.sampling,
              "a lookahead needs raw logits, which backend samplers take (llama_set_sampler): unset them, or "
              "use lookahead = deferred and prompts that fit the cells");
}

static std::vector<float> last_logits(const laq_context & laq) {
    laq.ctx->synchronize();  // a device may still compute them
    const float * logits = laq.ctx->get_logits_ith(-1);
    laq_check(logits, "the prompt's last token was decoded without logits, from which the lookahead starts");
    return std::vector<float>(logits, logits + laq.ctx->get_model().vocab.n_tokens());
}

// decode tokens of one sequence behind what it has; logits of the last one
static void decode(laq_context & laq, int32_t seq_id, const llama_token * tokens, uint32_t n) {
    const int32_t n_past = laq.n_tokens(seq_id);
    llama_batch   batch  = llama_batch_init(n, 0, 1);
    for (uint32_t i = 0; i < n; ++i) {
        batch.token[i]     = tokens[i];
        batch.pos[i]       = n_past + (int32_t) i;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = seq_id;
        batch.logits[i]    = i + 1 == n;
    }
    batch.n_tokens = n;

    const int32_t res = llama_decode(laq.ctx, batch);
    llama_batch_free(batch);
    if (res != 0) {
        throw laq_error(LAQ_STATUS_COMPUTE_FAILED,
                        "tokens could not be decoded ahead, or were aborted (llama_decode returned " +
                            std::to_string(res) + ")");
    }
}

// Decode up to n_most greedy tokens, as many as find cells. Ends early at an end-of-generation token, but not before
// the first token: its query is worth more than none. Returns how many.
static uint32_t decode_ahead(laq_context & laq, int32_t seq_id, std::vector<float> logits, uint32_t n_most) {
    const llama_vocab & vocab = laq.ctx->get_model().vocab;
    const uint32_t      n     = std::min(n_most, laq.store.n_free(seq_id));
    const int64_t       t0    = ggml_time_us();

    uint32_t i = 0;
    for (; i < n; ++i) {
        const llama_token token = std::max_element(logits.begin(), logits.end()) - logits.begin();
        if (i > 0 && vocab.is_eog(token)) {
            break;
        }
        decode(laq, seq_id, &token, 1);
        ++laq.stats.n_pseudo;
        logits = last_logits(laq);
    }
    laq.stats.ms_lookahead += (ggml_time_us() - t0) / 1000.0;
    return i;
}

// drop tokens that were decoded ahead; the prompt goes on
static void drop_from(laq_context & laq, int32_t seq_id, int32_t pos) {
    const laq_phase phase = laq.seqs[seq_id].phase;
    laq.store.kv.seq_rm(seq_id, pos, -1);
    laq.seqs[seq_id].phase = phase;
}

//
// without an archive: a probe before each eviction
//

static void evict_by_probe(laq_context & laq, int32_t seq_id, const llama_token * probe, const laq_chunk & chunk) {
    const int32_t n_past  = laq.n_tokens(seq_id);
    const int32_t n_probe = chunk.n_probe;

    const auto stop = [&] {
        laq.now.probing = false;
        laq.scratch.forget(0);
        drop_from(laq, seq_id, n_past);
    };
    laq.ctx->synchronize();
    laq.now.probing = true;
    try {
        const int64_t t0 = ggml_time_us();
        for (int32_t i = 0, n; i < n_probe; i += n) {
            n = std::min<int32_t>(n_probe - i, laq.ctx->n_batch());
            decode(laq, seq_id, probe + i, n);
        }
        laq.stats.n_probe += n_probe;
        const std::vector<float> logits = last_logits(laq);
        laq.stats.ms_probe += (ggml_time_us() - t0) / 1000.0;

        const uint32_t n_ahead = decode_ahead(laq, seq_id, logits, laq_policy_probe_ahead(laq.params));
        const int32_t  n_end   = n_past + n_probe + (int32_t) n_ahead;
        const uint32_t n_keep  = laq.n_resident(seq_id) - (uint32_t) (n_end - n_past) - chunk.n_evict;

        laq_plan plan = { seq_id, n_keep, laq.intact_from(seq_id, n_past), n_past };
        plan.queries  = laq_policy_queries(laq.params, n_past + n_probe, n_end);
        plan.by_probe = true;
        laq_carry_out(laq, plan);
    } catch (...) {
        stop();
        throw;
    }
    stop();
}

static laq_chunk plan_probed(const laq_context & laq, int32_t seq_id, uint32_t n_tokens) {
    const laq_params p = laq.params_of(seq_id);
    return laq_plan_chunk(&p, laq.store.n_cells(), laq.store.n_used(seq_id), laq.n_resident(seq_id), n_tokens,
                          laq.ctx->n_batch());
}

static void make_room_probed(laq_context & laq, int32_t seq_id, const llama_token * tokens, uint32_t n_tokens,
                             const laq_chunk & chunk) {
    if (chunk.n_evict == 0) {
        return;
    }
    if (chunk.n_probe > 0) {
        check_logits(laq);
        evict_by_probe(laq, seq_id, tokens + n_tokens - chunk.n_probe, chunk);
    } else {
        laq_evict_to(laq, seq_id, laq.n_resident(seq_id) - chunk.n_evict, false);
    }
}

//
// with an archive: every token attends
//

static laq_chunk plan_attending(const laq_context & laq, int32_t seq_id, uint32_t n_tokens) {
    return laq_plan_attending(laq.params,
                              { laq.store.n_cells(), laq.store.n_used(seq_id), laq.n_resident(seq_id), n_tokens,
                                laq.ctx->n_batch(), laq.facts.n_attend, laq.seqs[seq_id].n_intact > 0 });
}

// the newest tokens stay, without a look at any: all others are archived
static void make_room_attending(laq_context & laq, int32_t seq_id, const laq_chunk & chunk) {
    if (chunk.n_evict > 0) {
        const int32_t n_end = laq.n_tokens(seq_id);
        laq_carry_out(laq, { seq_id, laq.n_resident(seq_id) - chunk.n_evict, laq.intact_from(seq_id, n_end), n_end });
    }
}

// The end of the conversation was decoded from the cells alone: an answer. Its last tokens are read again and attend.
static void read_answer_again(laq_context & laq, int32_t seq_id) {
    laq_seq &     seq   = laq.seqs[seq_id];
    const int32_t n_end = laq.n_tokens(seq_id);
    if (seq.n_exact < n_end) {
        const uint32_t             n_most = std::min<uint32_t>(n_end - seq.n_exact, LAQ_REREAD);
        const std::vector<int32_t> tail   = seq.history.tail(seq.n_intact, n_end, n_most);
        const int64_t              t0     = ggml_time_us();
        const uint32_t             n_now  = std::min(laq.ctx->n_batch(), laq.facts.n_attend);
        drop_from(laq, seq_id, n_end - (int32_t) tail.size());
        for (uint32_t i = 0; i < tail.size(); i += n_now) {
            decode(laq, seq_id, tail.data() + i, std::min<uint32_t>(n_now, tail.size() - i));
        }
        laq.ctx->synchronize();
        laq.stats.n_reread += tail.size();
        laq.stats.ms_reread += (ggml_time_us() - t0) / 1000.0;
    }
    seq.n_exact = INT32_MAX;
}

//
// the next tokens of a prompt
//

static laq_chunk make_room(laq_context & laq, int32_t seq_id, const llama_token * tokens, uint32_t n_tokens) {
    const bool attends = laq.archive_of(seq_id) != nullptr;
    const auto plan    = [&] {
        return attends ? plan_attending(laq, seq_id, n_tokens) : plan_probed(laq, seq_id, n_tokens);
    };
    if (attends) {
        read_answer_again(laq, seq_id);
    }
    laq_chunk chunk = plan();
    if (chunk.n_tokens == 0 && laq.n_over(seq_id) > 0) {
        // no cells for a probe: the last tokens score
        laq_evict_to(laq, seq_id, laq.params.n_kv_budget, false);
        chunk = plan();
    }
    if (chunk.n_tokens == 0) {
        throw laq_error(LAQ_STATUS_NO_MEMORY,
                        "no cells for the next tokens of the prompt: " + std::to_string(laq.store.n_used(seq_id)) +
                            " of " + std::to_string(laq.store.n_cells()) +
                            " are in use, kv_budget = " + std::to_string(laq.params.n_kv_budget) +
                            ": raise kv_staging or lower kv_budget or probe_size");
    }
    if (attends) {
        make_room_attending(laq, seq_id, chunk);
    } else {
        make_room_probed(laq, seq_id, tokens, n_tokens, chunk);
    }
    return chunk;
}

uint32_t laq_read_next(laq_context & laq, int32_t seq_id, const int32_t * tokens, uint32_t n_tokens) {
    const laq_phase & phase = laq.seqs[seq_id].phase;
    if (phase.is(laq_phase::WAITING) && laq.n_tokens(seq_id) > phase.n_prompt) {
        laq_evict_waiting(laq, seq_id);  // the answer was shorter than the lookahead
    }
    const laq_phase before = phase;
    laq.seqs[seq_id].read(laq.n_tokens(seq_id), laq.archive_of(seq_id) ? laq_read_how::ATTENDING : laq_read_how::WHOLE);
    try {
        return make_room(laq, seq_id, tokens, n_tokens).n_tokens;
    } catch (...) {
        laq.seqs[seq_id].phase = before;
        throw;
    }
}

//
// the end of a prompt
//

// The prompt's last queries recall what it is looked ahead from: as many tokens as there are cells for.
static void recall_for_lookahead(laq_context & laq, int32_t seq_id) {
    const int32_t n_prompt = laq.n_tokens(seq_id);
    const int32_t first    = std::max(0, n_prompt - (int32_t) laq.params.n_window_snapkv);

    // values are fitted to all of these queries: every head holds what they see of each other
    const int32_t n_intact = std::max(laq.seqs[seq_id].n_intact, std::min(first, laq.intact_from(seq_id, n_prompt)));

    laq_plan plan = { seq_id, laq_policy_beside_ahead(laq.params, laq.n_room(seq_id)), n_intact, n_prompt };
    plan.queries  = { first, n_prompt };
    plan.recall   = true;
    laq_carry_out(laq, plan);
    laq.seqs[seq_id].phase.how = laq_read_how::WHOLE;
}

// The paper's lookahead (arXiv 2505.20334, section 3): decode n_lookahead greedy tokens, evict by their queries, drop
// them, and put the prompt's last logits back, also if something fails.
static void evict_by_pseudo(laq_context & laq, int32_t seq_id, const std::vector<float> & logits, bool recall) {
    const int32_t n_prompt = laq.n_tokens(seq_id);
    const auto    restore  = [&] {
        drop_from(laq, seq_id, n_prompt);
        if (float * dst = laq.ctx->get_logits_ith(-1)) {
            std::copy(logits.begin(), logits.end(), dst);
        }
    };
    try {
        const uint32_t n_ahead = decode_ahead(laq, seq_id, logits, laq.params.n_lookahead);

        laq_plan plan = { seq_id, laq.params.n_kv_budget, laq.intact_from(seq_id, n_prompt), n_prompt };
        plan.queries  = laq_policy_queries(laq.params, n_prompt, n_prompt + (int32_t) n_ahead);
        plan.recall   = recall;
        laq_carry_out(laq, plan);
    } catch (...) {
        restore();
        throw;
    }
    restore();
}

void laq_read_end(laq_context & laq, int32_t seq_id) {
    laq_phase & phase  = laq.seqs[seq_id].phase;
    const bool  recall = laq.has_archived(seq_id);
    if (laq.n_over(seq_id) == 0 && !recall) {
        phase = {};
        return;
    }
    if (!laq_policy_needs_lookahead(laq.params)) {
        laq_evict_to(laq, seq_id, laq.params.n_kv_budget, recall);
        phase = {};
        return;
    }
    const bool         is_pseudo = laq.params.lookahead == LAQ_LOOKAHEAD_PSEUDO;
    std::vector<float> logits;
    if (is_pseudo) {
        check_logits(laq);
        logits = last_logits(laq);
    }
    if (recall && laq.facts.ahead_from_cells && phase.attending()) {
        recall_for_lookahead(laq, seq_id);
    }
    if (is_pseudo) {
        evict_by_pseudo(laq, seq_id, logits, recall);
        phase = {};
    } else {
        phase.kind     = laq_phase::WAITING;
        phase.n_prompt = laq.n_tokens(seq_id);
    }
}
