#include "laq-lookahead.h"

#include "laq-cache.h"

#include "llama-model.h"

#include <algorithm>

static std::vector<float> last_logits(const laq_cache & laq) {
    const float * logits = laq.ctx->get_logits_ith(-1);
    if (!logits) {
        throw laq_error(LAQ_STATUS_INVALID_ARGUMENT,
                        "the prompt's last token was decoded without logits, from which the lookahead starts");
    }
    return std::vector<float>(logits, logits + laq.ctx->get_model().vocab.n_tokens());
}

// Decodes up to n_lookahead greedy tokens, as many as find cells. Ends early at an end-of-generation token, but not
// before the first one: its query is worth more than none.
static void decode_ahead(laq_cache & laq, std::vector<float> logits) {
    const llama_vocab & vocab = laq.ctx->get_model().vocab;
    const uint32_t      n     = std::min(laq.params.n_lookahead, laq.n_cells_max - laq.n_resident());

    for (uint32_t i = 0; i < n; ++i) {
        llama_token token = std::max_element(logits.begin(), logits.end()) - logits.begin();
        if (i > 0 && vocab.is_eog(token)) {
            break;
        }
        if (llama_decode(laq.ctx, llama_batch_get_one(&token, 1)) != 0) {
            throw laq_error(LAQ_STATUS_COMPUTE_FAILED, "the lookahead was aborted or could not be decoded");
        }
        ++laq.stats.n_pseudo;
        logits = last_logits(laq);
    }
}

// The paper's draft: the pseudo tokens are generated from a cache that SnapKV has cut, then the full one comes back.
// Their own keys go with the small cache: the softmax that scores then runs over the prompt's keys alone.
static void decode_ahead_from_snapkv(laq_cache & laq, int32_t n_prompt, const std::vector<float> & logits) {
    laq_params snapkv = laq.params;
    snapkv.policy     = LAQ_POLICY_SNAPKV;

    laq_storage full;
    laq.run_update([&] {
        int32_t        n_intact = 0;
        const laq_kept kept     = laq.select(snapkv, n_prompt, n_prompt, &n_intact);
        const uint32_t n        = kept[0][0].size() + laq.params.n_lookahead;

        full = laq.rebuild(laq_pad_cells(n, laq.n_cells_max), kept, n_intact);
    });
    const auto put_back = [&] { laq.run_update([&] { laq.swap_storage(full); }); };
    try {
        decode_ahead(laq, logits);
    } catch (...) {
        put_back();
        throw;
    }
    put_back();
}

void laq_evict_by_pseudo(laq_cache & laq) {
    const int32_t            n_prompt = laq.n_tokens();
    const std::vector<float> logits   = last_logits(laq);

    const auto restore = [&] {
        // cells of pseudo tokens are gone after an eviction, and still there if something failed
        laq.kv->seq_rm(0, n_prompt, -1);
        laq.forget_queries(n_prompt);
        if (float * dst = laq.ctx->get_logits_ith(-1)) {
            std::copy(logits.begin(), logits.end(), dst);
        }
    };
    try {
        const int64_t t0 = ggml_time_us();
        if (laq.params.draft == LAQ_DRAFT_SNAPKV) {
            decode_ahead_from_snapkv(laq, n_prompt, logits);
        } else {
            decode_ahead(laq, logits);
        }
        laq.stats.ms_lookahead += (ggml_time_us() - t0) / 1000.0;
        laq.run_update([&] { laq.evict(n_prompt, n_prompt); });
    } catch (...) {
        restore();
        throw;
    }
    restore();
}
