// laq.h: checks arguments, turns exceptions into a status and a text.

#include "laq-api.h"

#include "laq-read.h"

#include "ggml-backend.h"
#include "llama-arch.h"
#include "llama-impl.h"
#include "llama-memory-recurrent.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <memory>
#include <string>
#include <typeinfo>

static thread_local std::string last_error;

void laq_set_last_error(const std::string & what) {
    last_error = what;
}

[[noreturn]] static void unsupported(const std::string & what) {
    throw laq_error(LAQ_STATUS_UNSUPPORTED, what + "; unset kv_budget for this model");
}

// an older caller's struct is shorter, a newer one's longer: what both know is copied
template <typename T> static void copy_sized(T & dst, const T & src, uint32_t size) {
    memcpy(&dst, &src, std::min<size_t>(size, sizeof(T)));
}

//
// what this is
//

uint32_t laq_abi_version(void) {
    return LAQ_ABI_VERSION;
}

const char * laq_build_info(void) {
    static const std::string info = [] {
        std::string res =
            "version=" LAQ_VERSION " llama_cpp_python=" LAQ_UPSTREAM_VERSION " llama.cpp=" LAQ_UPSTREAM_COMMIT;
        res += " backends=";
        for (size_t i = 0; i < ggml_backend_reg_count(); ++i) {
            res += (i ? "," : "") + std::string(ggml_backend_reg_name(ggml_backend_reg_get(i)));
        }
        return res;
    }();
    return info.c_str();
}

const char * laq_status_str(laq_status status) {
    switch (status) {
        case LAQ_STATUS_OK:               return "ok";
        case LAQ_STATUS_INVALID_ARGUMENT: return "invalid argument";
        case LAQ_STATUS_UNSUPPORTED:      return "unsupported";
        case LAQ_STATUS_NO_MEMORY:        return "out of memory";
        case LAQ_STATUS_COMPUTE_FAILED:   return "compute failed";
        case LAQ_STATUS_INTERNAL:         return "internal error";
    }
    return "unknown status";
}

const char * laq_last_error(void) {
    return last_error.c_str();
}

laq_params laq_default_params(void) {
    laq_params p      = {};
    p.size            = sizeof(p);
    p.policy          = LAQ_POLICY_LAQ_PP;
    p.lookahead       = LAQ_LOOKAHEAD_DEFERRED;
    p.pooling         = LAQ_POOLING_MAX;
    p.n_lookahead     = 32;
    p.n_probe         = 48;
    p.n_window        = 8;
    p.n_window_snapkv = 32;
    p.n_sink          = 4;
    p.n_kernel        = 7;
    p.n_follow        = 32;
    p.value_fit       = 0.01f;
    p.archive_type    = -1;
    p.archive_limit   = UINT64_MAX;
    p.recall          = LAQ_RECALL_TURN;
    return p;
}

//
// attaching
//

static void check_spans(const laq_span * spans, uint32_t n) {
    laq_check(n == 0 || spans, "pinned is NULL but n_pinned is not 0");
    for (uint32_t i = 0; i < n; ++i) {
        laq_check(spans[i].p0 >= 0 && spans[i].p0 < spans[i].p1, "pinned: a span needs 0 <= p0 < p1");
    }
}

static void check_pinned(const laq_params & p) {
    const uint32_t n_pinned = laq_policy_n_pinned(p);
    laq_check(p.policy == LAQ_POLICY_FULL || p.n_kv_budget >= n_pinned,
              "kv_budget = " + std::to_string(p.n_kv_budget) + " is below the " + std::to_string(n_pinned) +
                  " tokens that are always kept (n_sink, pinned, window_size, "
                  "lookahead_size): raise kv_budget or lower those");
}

// the defaults stand for what an older caller does not know
static laq_params params_of_caller(const laq_params & params) {
    laq_check(params.size >= offsetof(laq_params, pinned) && params.size <= 4096, "params->size is not set");
    laq_params p = laq_default_params();
    copy_sized(p, params, params.size);
    return p;
}

static void check_enums(const laq_params & p) {
    laq_check(p.policy >= LAQ_POLICY_FULL && p.policy <= LAQ_POLICY_RANDOM, "kv_policy is not one of enum laq_policy");
    laq_check(p.lookahead >= LAQ_LOOKAHEAD_DEFERRED && p.lookahead <= LAQ_LOOKAHEAD_PSEUDO,
              "lookahead is not one of enum laq_lookahead");
    laq_check(p.pooling >= LAQ_POOLING_NONE && p.pooling <= LAQ_POOLING_AVG, "pooling is not one of enum laq_pooling");
    laq_check(p.recall >= LAQ_RECALL_TURN && p.recall <= LAQ_RECALL_ALWAYS,
              "recall is not one of enum laq_recall_when");
    laq_check(p.archive == 0 || p.archive == 1, "archive is neither 0 nor 1");
}

static void check_params(const laq_params & p, uint32_t n_cells) {
    check_enums(p);
    laq_check(p.n_kernel % 2 == 1, "kernel_size must be odd");
    laq_check(p.n_lookahead >= 1 && p.n_lookahead <= 1024, "lookahead_size must be in [1, 1024]");
    laq_check(p.n_window >= 1 && p.n_window <= 1024, "window_size must be in [1, 1024]");
    laq_check(p.n_window_snapkv >= 1 && p.n_window_snapkv <= 1024, "snapkv_window must be in [1, 1024]");
    laq_check(p.n_sink <= (1u << 30), "n_sink must be at most 2^30");
    laq_check(p.n_follow <= (1u << 30), "follow_size must be at most 2^30");
    laq_check(p.n_probe >= 1 && p.n_probe <= (1u << 20), "probe_size must be in [1, 2^20]");
    laq_check(std::isfinite(p.value_fit) && p.value_fit >= 0.0f, "value_fit must be finite and not negative");
    check_spans(p.pinned, p.n_pinned);
    check_pinned(p);
    laq_check(p.policy == LAQ_POLICY_FULL || p.n_kv_budget <= n_cells,
              "kv_budget = " + std::to_string(p.n_kv_budget) + " is above the " + std::to_string(n_cells) +
                  " cells of a sequence: lower kv_budget or make more cells");
}

static void check_context(const llama_context & ctx) {
    const llama_model &   model   = ctx.get_model();
    const llama_hparams & hparams = model.hparams;

    const std::string name = std::string("the architecture '") + llm_arch_name(model.arch) + "' ";

    llama_memory_t memory = ctx.get_memory();
    if (!memory) {
        unsupported(name + "has no KV cache (an encoder, for embeddings)");
    }
    if (llama_model_has_encoder(&model)) {
        unsupported(name + "has an encoder: its cross-attention is not in the KV cache");
    }
    if (dynamic_cast<llama_memory_recurrent *>(memory)) {
        unsupported(name + "is recurrent: its state has a fixed size and no KV cache to evict from");
    }
    if (hparams.use_alibi || hparams.f_max_alibi_bias > 0.0f) {
        unsupported(name + "uses ALiBi: its attention bias needs the true position of every cell");
    }
    if (typeid(*memory) != typeid(llama_kv_cache) || hparams.n_swa > 0) {
        unsupported(name + "does not use a plain KV cache (sliding window, hybrid or sparse attention)");
    }
    if (hparams.is_mla()) {
        unsupported(name + "uses MLA, whose latent cache is not supported yet");
    }
    if (hparams.n_pos_per_embd() > 1) {
        unsupported(name + "uses M-RoPE, which is not supported yet");
    }
    if (model.arch == LLM_ARCH_GROK) {
        unsupported(name + "scales its attention logits in a way that is not supported yet");
    }
    if (model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        throw laq_error(LAQ_STATUS_UNSUPPORTED,
                        "split_mode = tensor is not supported with kv_budget: use split_mode = layer");
    }
    laq_check(!hparams.no_alloc, "the model was loaded with no_alloc");
    laq_check(ctx.get_cparams().causal_attn && !ctx.get_cparams().embeddings,
              "a context for embeddings cannot be evicted: use embedding = false");
}

laq_status laq_attach(llama_context * ctx, const laq_params * params, laq_context ** out) {
    return laq_guarded([&] {
        laq_check(ctx && params && out, "ctx, params and out must not be NULL");
        laq_params p = params_of_caller(*params);
        *out         = nullptr;

        check_context(*ctx);
        laq_check(!ctx->get_cparams().laq, "the context has been attached already");
        const llama_kv_cache & kv = *static_cast<const llama_kv_cache *>(ctx->get_memory());
        laq_store::check(kv);
        check_params(p, kv.get_size());
        *out = std::make_unique<laq_context>(ctx, p).release();
    });
}

// what an attached context was made for stays so
static void check_change(const laq_context & laq, const laq_params & p) {
    laq_check(p.n_ctx == 0 || p.n_ctx == laq.n_ctx, "n_ctx is that of laq_attach()");
    laq_check(p.archive == laq.params.archive, "archive is that of laq_attach()");
    laq_check(laq.facts.can_score || !laq_policy_needs_queries(p),
              "kv_policy needs queries, which the one of laq_attach() did not: attach with this one");
    laq_check(laq.facts.with_outputs || !laq_policy_fits(p),
              "value_fit needs outputs, which the settings of laq_attach() did not: attach with these, or use 0");
    laq_check(std::max(p.n_window, p.n_window_snapkv) + p.n_lookahead <= laq.seqs[0].ring.size() &&
                  p.n_window + laq_policy_probe_ahead(p) <= laq.scratch.size(),
              "window_size, snapkv_window and lookahead_size need more queries than were allocated");
    for (const laq_seq & seq : laq.seqs) {
        laq_check(!seq.phase.is(laq_phase::WAITING), "an eviction waits: call laq_flush() first");
    }
    for (const auto & parked : laq.parked) {
        laq_check(!parked->seq.phase.is(laq_phase::WAITING),
                  "an eviction of a parked sequence waits: resume it and call laq_flush() first");
    }
}

laq_status laq_set_params(laq_context * laq, const laq_params * params) {
    return laq_guarded([&] {
        laq_check(laq && params, "laq and params must not be NULL");
        laq_params p = params_of_caller(*params);
        check_params(p, laq->store.n_cells());
        check_change(*laq, p);
        p.archive_type   = laq->params.archive_type;
        p.archive_limit  = laq->params.archive_limit;
        p.archive_folder = laq->params.archive_folder;
        laq->set_params(p);
    });
}

void laq_detach(laq_context * laq) {
    delete laq;
}

//
// running
//

laq_status laq_set_pinned(laq_context * laq, int32_t seq_id, const laq_span * spans, uint32_t n_spans) {
    return laq_guarded([&] {
        laq_check_seq(laq, seq_id);
        check_spans(spans, n_spans);
        laq_params p = laq->params;
        p.pinned     = spans;
        p.n_pinned   = n_spans;
        check_pinned(p);
        laq->seqs[seq_id].pinned.assign(spans, spans + n_spans);
    });
}

laq_status laq_prompt_next(laq_context * laq, int32_t seq_id, const int32_t * tokens, uint32_t n_tokens,
                           uint32_t * n_chunk) {
    return laq_guarded([&] {
        laq_check_seq(laq, seq_id);
        laq_check(tokens && n_tokens > 0 && n_chunk, "tokens and n_chunk must not be NULL, n_tokens not 0");
        const int64_t n_end = (int64_t) laq->n_tokens(seq_id) + n_tokens;
        laq_check(n_end <= laq->n_ctx, std::to_string(n_end) + " tokens do not fit n_ctx = " +
                                           std::to_string(laq->n_ctx) + ": shorten the prompt or raise n_ctx");
        *n_chunk = laq_read_next(*laq, seq_id, tokens, n_tokens);
    });
}

laq_status laq_prompt_end(laq_context * laq, int32_t seq_id) {
    return laq_guarded([&] {
        laq_check_seq(laq, seq_id);
        laq_read_end(*laq, seq_id);
    });
}

laq_status laq_flush(laq_context * laq, int32_t seq_id) {
    return laq_guarded([&] {
        laq_check_seq(laq, seq_id);
        if (laq->seqs[seq_id].phase.is(laq_phase::WAITING)) {
            laq_evict_waiting(*laq, seq_id);
        }
    });
}

laq_status laq_evict(laq_context * laq, int32_t seq_id, uint32_t n_keep) {
    return laq_guarded([&] {
        laq_check_seq(laq, seq_id);
        laq_check(laq->params.policy != LAQ_POLICY_FULL, "kv_policy = full never evicts");
        laq_params p  = laq->params_of(seq_id);
        p.n_kv_budget = n_keep;
        check_pinned(p);
        if (laq->n_resident(seq_id) > n_keep) {
            laq_evict_to(*laq, seq_id, n_keep, false);
        }
    });
}

laq_status laq_recall(laq_context * laq, int32_t seq_id) {
    return laq_guarded([&] {
        laq_check_seq(laq, seq_id);
        laq_check(laq->params.archive != 0, "there is no archive to recall from: use kv_recall");
        if (laq->seqs[seq_id].phase.is(laq_phase::WAITING)) {
            laq_evict_waiting(*laq, seq_id);
        } else if (laq->has_archived(seq_id)) {
            laq_evict_to(*laq, seq_id, laq->params.n_kv_budget, true);
        }
    });
}

laq_status laq_save_archive(laq_context * laq, bool on) {
    return laq_guarded([&] {
        laq_check(laq, "laq must not be NULL");
        laq->now.archives = on;
    });
}

laq_status laq_get_stats(const laq_context * laq, int32_t seq_id, laq_stats * stats) {
    return laq_guarded([&] {
        laq_check_seq(laq, seq_id);
        laq_check(stats && stats->size >= sizeof(uint32_t), "stats is NULL or stats->size is not set");

        laq_stats s     = laq->stats;
        s.size          = stats->size;
        s.n_tokens      = laq->n_tokens(seq_id);
        s.n_resident    = laq->n_resident(seq_id);
        s.n_intact      = laq->seqs[seq_id].n_intact;
        s.pending       = laq->seqs[seq_id].phase.is(laq_phase::WAITING);
        s.n_used        = laq->store.n_used();
        s.n_cells       = laq->store.n_cells() * laq->store.kv.get_n_stream();
        s.n_layer       = laq->store.layers.size();
        s.n_head_kv     = laq->store.n_head_kv_max();
        s.kv_bytes      = laq->store.kv_bytes();
        s.ring_bytes    = laq->store.ring_bytes();
        s.compute_bytes = laq->compute_bytes();
        s.devices       = laq->facts.devices.c_str();
        if (const laq_archive * archive = laq->archive_of(seq_id)) {
            s.archive_bytes      = archive->bytes_in_memory();
            s.archive_file_bytes = archive->bytes_in_file();
            s.n_archived         = archive->n_archived();
            s.n_lost             = archive->n_lost;
        }
        copy_sized(*stats, s, stats->size);
    });
}

laq_status laq_kept_positions(const laq_context * laq, int32_t seq_id, int32_t * dst, uint64_t n) {
    return laq_guarded([&] {
        laq_check_seq(laq, seq_id);
        laq_check(dst || n == 0, "dst must not be NULL");
        const std::vector<uint32_t> order = laq->store.resident(seq_id);

        for (const laq_layer & layer : laq->store.layers) {
            laq_check(layer.n_head_kv == laq->store.layers[0].n_head_kv, "layers differ in their number of KV heads");
        }
        laq_check(n == laq->store.n_heads * order.size(), "dst needs n_layer*n_head_kv*n_resident elements");
        for (uint32_t head = 0; head < laq->store.n_heads; ++head) {
            for (const laq_held & held : laq_held_by(*laq, seq_id, head, order)) {
                *dst++ = held.pos;
            }
        }
    });
}
