// Reading a prompt into cells that may be fewer than its tokens, and looking ahead from its end.

#include "laq-prompt.h"

#include "laq-cache.h"
#include "laq-recall.h"

#include "ggml.h"
#include "llama-model.h"

#include <algorithm>
#include <utility>

static std::vector<float> last_logits(const laq_cache & laq) {
    laq.ctx->synchronize();  // a device may still compute them
    const float * logits = laq.ctx->get_logits_ith(-1);
    if (!logits) {
        throw laq_error(LAQ_STATUS_INVALID_ARGUMENT,
                        "the prompt's last token was decoded without logits, from which the lookahead starts");
    }
    return std::vector<float>(logits, logits + laq.ctx->get_model().vocab.n_tokens());
}

// decode tokens of one sequence behind what it has; logits of the last one
static void decode(laq_cache & laq, int32_t seq_id, const llama_token * tokens, uint32_t n) {
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
                        "the lookahead was aborted or could not be decoded (llama_decode returned " +
                            std::to_string(res) + ")");
    }
}

// most tokens that are decoded at once
static uint32_t n_batch_of(const laq_cache & laq, int32_t seq_id) {
    const uint32_t n = laq.ctx->n_batch();
    return laq.seqs[seq_id].attending ? std::min(n, laq.n_attend) : n;
}

// One pass over tokens that say nothing: their queries know only where they stand. Returns how many.
static uint32_t decode_placeholders(laq_cache & laq, int32_t seq_id, uint32_t n) {
    const llama_vocab & vocab = laq.ctx->get_model().vocab;

    const std::vector<llama_token> tokens(n, std::max(0, vocab.token_nl()));

    const int64_t t0 = ggml_time_us();
    for (uint32_t i = 0; i < n;) {
        const uint32_t n_batch = std::min(n - i, n_batch_of(laq, seq_id));
        decode(laq, seq_id, tokens.data() + i, n_batch);
        i += n_batch;
    }
    laq.ctx->synchronize();
    laq.stats.n_pseudo += n;
    laq.stats.ms_lookahead += (ggml_time_us() - t0) / 1000.0;
    return n;
}

// Decodes up to n_most greedy tokens, as many as find cells. Ends early at an end-of-generation token, but not
// before the first one: its query is worth more than none. Returns how many.
static uint32_t decode_ahead(laq_cache & laq, int32_t seq_id, std::vector<float> logits, uint32_t n_most) {
    const uint32_t n = std::min(n_most, laq.n_cells() - laq.n_used());
    if (laq.params.lookahead == LAQ_LOOKAHEAD_POSITION) {
        return decode_placeholders(laq, seq_id, n);
    }
    const llama_vocab & vocab = laq.ctx->get_model().vocab;

    const int64_t t0 = ggml_time_us();
    uint32_t      i  = 0;
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

// drop tokens that were decoded ahead, and their queries
static void forget_from(laq_cache & laq, int32_t seq_id, int32_t pos) {
    // their cells are gone after an eviction, and still there if something failed
    const bool remembers = laq.seqs[seq_id].remembers;
    laq.kv->seq_rm(seq_id, pos, -1);
    laq.seqs[seq_id].ring.forget(pos);
    laq.seqs[seq_id].remembers = remembers;
}

//
// a prompt that finds no cells
//

static void evict_by_probe(laq_cache & laq, int32_t seq_id, const llama_token * probe, const laq_chunk & plan) {
    const int32_t n_past  = laq.n_tokens(seq_id);
    const int32_t n_probe = plan.n_probe;

    const auto stop = [&] {
        laq.probing = false;
        laq.scratch.forget(0);
        forget_from(laq, seq_id, n_past);
    };
    laq.probing = true;
    try {
        const int64_t t0 = ggml_time_us();
        for (int32_t i = 0, n; i < n_probe; i += n) {
            n = std::min<int32_t>(n_probe - i, laq.ctx->n_batch());
            decode(laq, seq_id, probe + i, n);
        }
        laq.stats.n_probe += n_probe;
        const std::vector<float> logits = last_logits(laq);
        laq.stats.ms_probe += (ggml_time_us() - t0) / 1000.0;

        const uint32_t n_ahead  = decode_ahead(laq, seq_id, logits, laq_policy_probe_ahead(laq.params));
        const int32_t  n_end    = n_past + n_probe + (int32_t) n_ahead;
        const auto     queries  = laq_policy_queries(laq.params, n_past + n_probe, n_end);
        const uint32_t n_keep   = laq.n_resident(seq_id) - (uint32_t) (n_end - n_past) - plan.n_evict;
        const int32_t  n_intact = laq.intact_in_prompt(seq_id, n_past, n_keep);
        laq.run_update([&] { laq.evict({ seq_id, n_keep, queries, true, n_intact, n_past }); });
    } catch (...) {
        stop();
        throw;
    }
    stop();
}

// the chunk that comes next, and its eviction
static void make_room_for(laq_cache & laq, int32_t seq_id, const llama_token * tokens, uint32_t n_tokens,
                          const laq_chunk & plan) {
    if (plan.n_evict == 0) {
        return;
    }
    if (plan.n_probe > 0) {
        evict_by_probe(laq, seq_id, tokens + n_tokens - plan.n_probe, plan);
    } else {
        laq.run_update([&] { laq.evict_to(seq_id, laq.n_resident(seq_id) - plan.n_evict); });
    }
}

// The prompt's last tokens were read while what they look at was not there: they are read again.
static void read_again(laq_cache & laq, int32_t seq_id, const std::vector<llama_token> & tail) {
    const int32_t n_prompt = laq.n_tokens(seq_id);
    const int32_t n        = tail.size();
    if (n == 0) {
        return;
    }
    const int64_t t0 = ggml_time_us();
    forget_from(laq, seq_id, n_prompt - n);
    for (int32_t i = 0, n_now; i < n; i += n_now) {
        n_now = std::min<int32_t>(n - i, n_batch_of(laq, seq_id));
        decode(laq, seq_id, tail.data() + i, n_now);
    }
    laq.ctx->synchronize();
    laq.stats.n_reread += n;
    laq.stats.ms_reread += (ggml_time_us() - t0) / 1000.0;
}

// The last tokens, at most n_most, choose n_keep of all tokens and are read again: a `part` by all of its queries, which
// values are then fitted to, a message by the last ones. Returns whether anything new came.
static bool choose_and_read_again(laq_cache & laq, int32_t seq_id, uint32_t n_most, uint32_t n_keep, bool part,
                                  bool always) {
    const int32_t                  n_past = laq.n_tokens(seq_id);
    const std::vector<llama_token> tail   = laq.recall->tail(laq, seq_id, n_past, n_most);
    const int32_t                  first  = n_past - (int32_t) tail.size();
    if (tail.empty()) {
        return false;
    }
    laq_eviction e = {
        seq_id, n_keep, laq_policy_message(laq.params, first, n_past), false, first, n_past, true, always
    };
    if (part) {
        e.queries = { first, n_past };
        e.n_fit   = tail.size();
    }
    bool is_new = false;
    laq.run_update([&] { is_new = laq.choose_again(e); });
    if (is_new) {
        read_again(laq, seq_id, tail);
    }
    return is_new;
}

//
// a prompt that is read twice, in parts that have all their queries in the ring
//
// The first reading brings the queries of a part. They choose from all tokens, and values are fitted until these queries
// get what they would get from all of them. The second reading then is nearly what it would be in view of the whole
// prompt, and nothing needs to be known of the question: no probes.
//

static uint32_t n_room_of(const laq_cache & laq, int32_t seq_id) {
    return laq.n_resident(seq_id) + laq.n_cells() - laq.n_used();
}

// cells but those that stay free to look ahead
static uint32_t n_cells_beside_ahead(const laq_cache & laq) {
    return laq.n_cells() - std::min(laq.n_cells(), laq_policy_ahead(laq.params));
}

// Tokens that each head holds while a part is read: there is room for the next one, and to look ahead.
static uint32_t n_kept_beside(const laq_cache & laq, int32_t seq_id, uint32_t n_part) {
    const uint32_t n_room = laq_policy_draft(laq.params, n_room_of(laq, seq_id));
    return std::max(laq.params.n_kv_budget, n_room - std::min(n_room, n_part));
}

// Tokens of a part, 0: none is read twice. A head holds a part whole, what is pinned, and four times as many as the part in
// all.
static uint32_t n_part_of(const laq_cache & laq, int32_t seq_id) {
    if (laq.params.n_recall_rounds == 0 || !laq.may_recall(seq_id, LAQ_RECALL_TURN) || !laq.fits_to_archive()) {
        return 0;
    }
    laq_params p  = laq.params_of(seq_id);
    p.n_reread    = std::min<size_t>(laq.params.n_chunk, laq.seqs[seq_id].ring.pos.size());
    p.n_kv_budget = n_kept_beside(laq, seq_id, p.n_reread);
    return laq_policy_reread(p);
}

// the last part, and room for the next one
static void read_part_again(laq_cache & laq, int32_t seq_id, uint32_t n_part) {
    // otherwise it was read in view of all there is
    if (laq.observes_archive(seq_id, laq.resident(seq_id))) {
        choose_and_read_again(laq, seq_id, n_part, n_kept_beside(laq, seq_id, n_part), true, true);
    }
}

// the plan of a chunk of at most n_chunk tokens that no probe comes before: there is room to look ahead
static laq_chunk plan_without_probe(const laq_cache & laq, int32_t seq_id, uint32_t n_tokens, uint32_t n_chunk) {
    laq_params p = laq.params_of(seq_id);
    p.policy     = LAQ_POLICY_SNAPKV;
    p.n_chunk    = n_chunk;
    return laq_plan_chunk(&p, n_cells_beside_ahead(laq), laq.n_used(), laq.n_resident(seq_id), n_tokens,
                          laq.ctx->n_batch());
}

// the next part, or as many tokens as there are cells for before anything goes
static laq_chunk plan_part(const laq_cache & laq, int32_t seq_id, uint32_t n_tokens, uint32_t n_part) {
    const uint32_t n_cells = n_cells_beside_ahead(laq);
    const uint32_t n_free  = n_cells - std::min(n_cells, laq.n_used());
    const bool     is_all  = !laq.observes_archive(seq_id, laq.resident(seq_id));
    const uint32_t n_chunk = is_all && n_free > n_part ? std::min(laq.params.n_chunk, n_free) : n_part;
    return plan_without_probe(laq, seq_id, n_tokens, n_chunk);
}

//
// a prompt that is read in view of its archive
//

// The end of the conversation, as far as it was decoded in view of the cells alone: an answer.
static void read_answer_again(laq_cache & laq, int32_t seq_id) {
    const int32_t n_end   = laq.n_tokens(seq_id);
    const int32_t n_exact = laq.seqs[seq_id].n_exact;
    if (n_exact < n_end) {
        const uint32_t n = std::min<uint32_t>(n_end - n_exact, laq.params.n_reread);
        read_again(laq, seq_id, laq.recall->tail(laq, seq_id, n_end, n));
    }
    laq.seqs[seq_id].n_exact = INT32_MAX;
}

// What is in the cells meanwhile makes no difference: the fewer evictions, the better.
static laq_chunk plan_attending(const laq_cache & laq, int32_t seq_id, uint32_t n_tokens) {
    const uint32_t n_cells    = n_cells_beside_ahead(laq);
    const uint32_t n_resident = laq.n_resident(seq_id);
    laq_chunk      plan       = plan_without_probe(laq, seq_id, n_tokens, laq.params.n_chunk);
    if (plan.n_evict > 0) {
        plan.n_evict  = n_resident - laq.params.n_kv_budget;
        plan.n_tokens = std::min(n_tokens, laq.ctx->n_batch());
    }
    if (plan.n_evict > 0 || laq.seqs[seq_id].n_intact > 0) {
        // two halves at the end, no small rest: ggml's CPU backend sums the attention of fewer than 64 tokens in another order
        const bool is_end = n_tokens > laq.n_attend && n_tokens < 2 * laq.n_attend;
        plan.n_tokens     = std::min(plan.n_tokens, is_end ? (n_tokens + 1) / 2 : laq.n_attend);
    }
    const uint32_t n_free = n_cells - std::min(n_cells, laq.n_used() - plan.n_evict);
    plan.n_tokens         = std::min(plan.n_tokens, n_free);
    return plan;
}

// the last tokens stay, without a look at any: all of them are in the archive
static void make_room_attending(laq_cache & laq, int32_t seq_id, const laq_chunk & plan) {
    if (plan.n_evict == 0) {
        return;
    }
    const int32_t n_end = laq.n_tokens(seq_id);
    laq.run_update([&] {
        laq.evict(
            { seq_id, laq.n_resident(seq_id) - plan.n_evict, { 0, 0 }, false, laq.intact_from(seq_id, n_end), n_end });
    });
}

uint32_t laq_read_on(laq_cache & laq, int32_t seq_id, const int32_t * tokens, uint32_t n_tokens) {
    const laq_params p       = laq.params_of(seq_id);
    const bool       attends = laq.may_attend(seq_id);
    const uint32_t   n_part  = attends ? 0 : n_part_of(laq, seq_id);
    const auto       plan    = [&] {
        return attends      ? plan_attending(laq, seq_id, n_tokens)
               : n_part > 0 ? plan_part(laq, seq_id, n_tokens, n_part)
                            : laq_plan_chunk(&p, laq.n_cells(), laq.n_used(), laq.n_resident(seq_id), n_tokens,
                                             laq.ctx->n_batch());
    };
    laq.seqs[seq_id].attending = attends;
    if (attends) {
        laq.seqs[seq_id].remembers = false;
        read_answer_again(laq, seq_id);
    }
    if (n_part > 0 && laq.seqs[seq_id].in_parts) {
        read_part_again(laq, seq_id, n_part);
    }
    laq_chunk chunk = plan();
    if (chunk.n_tokens == 0 && p.policy != LAQ_POLICY_FULL && laq.n_resident(seq_id) > p.n_kv_budget) {
        // no cells for a probe: as if the tokens had been generated
        laq.run_update([&] { laq.overflow(seq_id); });
        chunk = plan();
    }
    if (chunk.n_tokens == 0) {
        throw laq_error(LAQ_STATUS_NO_MEMORY,
                        "no cells for the next tokens of the prompt: " + std::to_string(laq.n_used()) + " of " +
                            std::to_string(laq.n_cells()) + " are in use, kv_budget = " +
                            std::to_string(p.n_kv_budget) + ": raise kv_staging or lower kv_budget or probe_size");
    }
    // the end of this prompt brings its own eviction; a probe must not pass for the lookahead of the last one
    const auto pending = std::exchange(laq.seqs[seq_id].pending, std::nullopt);
    laq.seqs[seq_id].remembers &= !pending;
    try {
        if (attends) {
            make_room_attending(laq, seq_id, chunk);
        } else {
            make_room_for(laq, seq_id, tokens, n_tokens, chunk);
        }
    } catch (...) {
        laq.seqs[seq_id].pending = pending;
        throw;
    }
    laq.seqs[seq_id].in_parts |= n_part > 0 && chunk.n_tokens < n_tokens;
    laq.seqs[seq_id].attending = attends;  // an eviction ends it
    return chunk.n_tokens;
}

//
// the end of a prompt
//

// The paper's draft: the pseudo tokens are generated from a cache that SnapKV has cut, then the full one comes back.
// Their own keys go with the small cache: the softmax that scores then runs over the prompt's keys alone.
static uint32_t decode_ahead_from_snapkv(laq_cache & laq, int32_t seq_id, const std::vector<float> & logits) {
    const std::vector<uint8_t> full        = laq_state_of_cells(laq, seq_id);  // the archive stays where it is
    const uint32_t             n_evictions = laq.stats.n_evictions;            // what is put back was not evicted
    const auto                 put_back    = [&] {
        laq.stats.n_evictions = n_evictions;

        laq.keep_rings = true;  // the queries of the pseudo tokens are what all this is for
        const size_t n = laq.ctx->state_seq_set_data(seq_id, full.data(), full.size(), 0);
        laq.keep_rings = false;
        if (laq.recall) {
            laq.recall->archive.forget(laq.seqs[seq_id].n_intact);
        }
        if (n != full.size()) {
            throw laq_error(LAQ_STATUS_INTERNAL, "draft = snapkv: the full cache could not be put back");
        }
    };
    const int32_t policy = laq.params.policy;
    uint32_t      n      = 0;
    try {
        laq.params.policy = LAQ_POLICY_SNAPKV;
        laq.run_update([&] { laq.evict_to(seq_id, laq.params.n_kv_budget); });
        laq.params.policy = policy;
        n                 = decode_ahead(laq, seq_id, logits, laq.params.n_lookahead);
    } catch (...) {
        laq.params.policy = policy;
        put_back();
        throw;
    }
    put_back();
    return n;
}

// What was read in view of all there is chooses what it is looked ahead from: as many tokens as there are cells for.
static void choose_for_lookahead(laq_cache & laq, int32_t seq_id) {
    const int32_t      n_prompt = laq.n_tokens(seq_id);
    const laq_eviction e        = { seq_id,
                                    laq_policy_draft(laq.params, n_room_of(laq, seq_id)),
                                    laq_policy_message(laq.params, 0, n_prompt),
                                    false,
                                    laq.intact_from(seq_id, n_prompt),
                                    n_prompt,
                                    true,
                                    true };
    laq.run_update([&] { laq.choose_again(e); });
    laq.seqs[seq_id].attending = false;
}

bool laq_recall_for_message(laq_cache & laq, int32_t seq_id, bool probed) {
    if (laq.seqs[seq_id].attending) {
        if (laq.params.recall_read == LAQ_RECALL_READ_PROMPT && laq_policy_needs_lookahead(laq.params)) {
            choose_for_lookahead(laq, seq_id);
        }
        return true;
    }
    // Probes have looked for this message, and ahead of it: what they kept is more than its own queries know of. Where
    // values are fitted, they come to give what all tokens give, from which it is read again.
    if (probed && !laq.fits_to_archive()) {
        return false;
    }
    const uint32_t n_rounds = laq_policy_rounds(laq.params, probed);
    const uint32_t n_ring   = laq.seqs[seq_id].ring.pos.size();
    const uint32_t n_reread = laq_policy_reread(laq.params_of(seq_id));
    const bool     in_parts = laq.seqs[seq_id].in_parts;
    const uint32_t n_most   = in_parts ? std::min(n_reread, n_ring) : n_reread;
    const uint32_t n_keep   = laq_policy_draft(laq.params, n_room_of(laq, seq_id));

    bool drafted = false;
    for (uint32_t i = 0; i < n_rounds; ++i) {
        if (!choose_and_read_again(laq, seq_id, n_most, n_keep, in_parts, probed)) {
            break;  // what it looks at is here
        }
        drafted = true;
    }
    return drafted;
}

// decode ahead, evict by that and drop it; the prompt's logits are back then, also if something failed
static void evict_by_lookahead(laq_cache & laq, int32_t seq_id, const std::vector<float> & logits, bool recall,
                               uint32_t n_keep) {
    const int32_t n_prompt = laq.n_tokens(seq_id);
    const auto    restore  = [&] {
        forget_from(laq, seq_id, n_prompt);
        if (float * dst = laq.ctx->get_logits_ith(-1)) {
            std::copy(logits.begin(), logits.end(), dst);
        }
    };
    try {
        const uint32_t n_ahead = laq.params.draft == LAQ_DRAFT_SNAPKV && laq.n_resident(seq_id) > laq.params.n_kv_budget
                                     ? decode_ahead_from_snapkv(laq, seq_id, logits)
                                     : decode_ahead(laq, seq_id, logits, laq.params.n_lookahead);

        const auto    queries  = laq_policy_queries(laq.params, n_prompt, n_prompt + (int32_t) n_ahead);
        const int32_t n_intact = laq.intact_from(seq_id, n_prompt);
        laq.run_update([&] { laq.evict({ seq_id, n_keep, queries, false, n_intact, n_prompt, recall }); });
    } catch (...) {
        restore();
        throw;
    }
    restore();
}

void laq_evict_by_pseudo(laq_cache & laq, int32_t seq_id, bool drafted, bool probed) {
    const std::vector<float> logits   = last_logits(laq);
    const uint32_t           n_before = laq.stats.n_recalls;
    const bool               recall   = laq.recalls(seq_id, LAQ_RECALL_TURN);

    // Those that stay whole, unless they were read in view of more already. Reading more of them again would take cells
    // from the tokens that come back.
    std::vector<llama_token> tail;
    if (recall && !drafted) {
        tail = laq.recall->tail(laq, seq_id, laq.n_tokens(seq_id), laq_policy_window(laq.params));
    }
    // the last one is looked ahead from as many tokens as there are cells for
    for (uint32_t i = laq_policy_lookaheads(drafted && probed); i > 1; --i) {
        evict_by_lookahead(laq, seq_id, logits, recall, laq_policy_draft(laq.params, n_room_of(laq, seq_id)));
    }
    evict_by_lookahead(laq, seq_id, logits, recall, laq.params.n_kv_budget);
    if (laq.stats.n_recalls > n_before) {
        read_again(laq, seq_id, tail);
    }
}
