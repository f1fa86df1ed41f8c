#include "laq-context.h"

#include "laq-graph-fit.h"
#include "laq-graph-move.h"
#include "laq-graph-score.h"

#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

static laq_facts facts_of(const llama_context & ctx, const laq_params & p, const laq_store & store) {
    const char * asked   = getenv("LAQ_CELLS");
    const bool   in_host = store.in_host_memory() && !(asked && strcmp(asked, "device") == 0);

    laq_facts res        = {};
    res.with_outputs     = p.value_fit > 0.0f;
    res.can_score        = laq_policy_needs_queries(p);
    res.devices          = store.devices();
    res.ahead_from_cells = !in_host || ctx.n_seq_max() > 1;
    res.debug            = getenv("LAQ_DEBUG") != nullptr;
    // all of a layer goes to a device for each ubatch
    res.n_attend  = in_host ? LAQ_ATTEND : ctx.n_ubatch();
    res.n_ctx_own = ctx.n_ctx_seq();
    return res;
}

// nodes of the largest graph, a fit
static size_t max_nodes(const llama_kv_cache & kv) {
    return 64 * kv.get_layer_ids().size() + 64;
}

static llama_kv_cache & cache_of(const llama_context & ctx) {
    return *static_cast<llama_kv_cache *>(ctx.get_memory());
}

laq_context::laq_context(llama_context * ctx, const laq_params & p) :
    ctx(ctx), params(p), n_ctx(p.n_ctx ? p.n_ctx : ctx->n_ctx_seq()), store(cache_of(*ctx), ctx->get_model().hparams),
    compute(ctx->get_sched(), max_nodes(cache_of(*ctx))), seqs(ctx->n_seq_max()), archives(seqs.size()) {
    facts          = facts_of(*ctx, p, store);
    facts.by_graph = laq_moves_by_graph(compute, store);
    pinned.assign(p.pinned, p.pinned + p.n_pinned);
    params.pinned  = pinned.data();
    params.n_chunk = laq_policy_chunk(params, store.n_cells());
    init_rings();
    init_archives();

    stats.n_ctx         = n_ctx;
    stats.compact_graph = facts.by_graph;
    stats.kv_bytes_full = store.kv_bytes() / (store.n_cells() * store.kv.get_n_stream()) * n_ctx;

    store.set_laq(this);
    // the logical length decides between the long and the short RoPE factors
    ctx->set_laq(this, n_ctx);
    try {
        ctx->sched_reserve();
        reserve();
    } catch (...) {
        store.set_laq(nullptr);
        ctx->set_laq(nullptr, facts.n_ctx_own);
        throw;
    }
}

laq_context::~laq_context() {
    ctx->synchronize();  // a device may still write to the rings
    store.set_laq(nullptr);
    ctx->set_laq(nullptr, facts.n_ctx_own);
}

void laq_context::init_rings() {
    const uint32_t n_ring  = std::max(params.n_window, params.n_window_snapkv) + params.n_lookahead;
    const uint32_t n_probe = params.n_window + laq_policy_probe_ahead(params);

    facts.n_slots = 0;
    for (laq_seq & seq : seqs) {
        seq.pinned = pinned;
        seq.ring.init(facts.n_slots, n_ring);
        facts.n_slots += n_ring;
    }
    scratch.init(facts.n_slots, n_probe);
    facts.n_slots += n_probe + 1;
    store.init_rings(facts.n_slots, facts.with_outputs);
}

//
// archives
//

static ggml_type archive_type(const laq_params & p, const ggml_tensor * t, uint32_t n_embd_head) {
    if (p.archive_type < 0 || p.archive_type == t->type) {
        return t->type;
    }
    const ggml_type type = (ggml_type) p.archive_type;
    bool            fits = type < GGML_TYPE_COUNT;
    if (fits && type != GGML_TYPE_F32) {
        const ggml_type_traits * traits = ggml_get_type_traits(type);
        fits                            = traits->to_float && traits->from_float_ref;
    }
    if (!fits || n_embd_head % ggml_blck_size(type) != 0 ||
        ggml_row_size(type, n_embd_head) > ggml_row_size(t->type, n_embd_head)) {
        throw laq_error(LAQ_STATUS_INVALID_ARGUMENT,
                        "kv_recall_type cannot hold heads of " + std::to_string(n_embd_head) + " from a cache of " +
                            ggml_type_name(t->type) + " in fewer bytes: leave it out for the cache's own type");
    }
    return type;
}

void laq_context::init_archives() {
    if (params.archive == 0) {
        return;
    }
    laq_check(laq_policy_needs_queries(params), "kv_recall chooses by attention: use kv_policy = laq, laq++ or snapkv");
    laq_archive_shape shape;
    for (int part = 0; part < 2; ++part) {
        shape.type[part] = archive_type(params, store.part(0, part, 0), store.layers[0].n_embd_head(part));
    }
    for (const laq_layer & layer : store.layers) {
        shape.layers.push_back({ layer.n_head_kv,
                                 { ggml_row_size((ggml_type) shape.type[0], layer.n_embd_head_k),
                                   ggml_row_size((ggml_type) shape.type[1], layer.n_embd_head_v) } });
    }
    const std::string folder = params.archive_folder ? params.archive_folder : "";
    for (size_t s = 0; s < seqs.size(); ++s) {
        archives[s] = std::make_unique<laq_archive>(shape, params.archive_limit, folder, [](const std::string & what) {
            LLAMA_LOG_WARN("laq_archive: %s\n", what.c_str());
        });
        // what is decoded ahead takes slots, too
        seqs[s].history.init(LAQ_REREAD + params.n_lookahead);
    }
    laq_check(archives[0]->can_hold(), "kv_recall_limit holds no tokens: give at least " +
                                           std::to_string(archives[0]->block_bytes()) +
                                           " bytes, or a folder for a file");
}

//
// parameters
//

void laq_context::set_params(const laq_params & p) {
    const laq_params            before        = params;
    const std::vector<laq_span> pinned_before = pinned;
    try {
        std::vector<laq_span> spans(p.pinned, p.pinned + p.n_pinned);
        params = p;
        pinned.swap(spans);
        params.pinned  = pinned.data();
        params.n_chunk = laq_policy_chunk(params, store.n_cells());
        reserve();
    } catch (...) {
        params        = before;
        pinned        = pinned_before;
        params.pinned = pinned.data();
        throw;
    }
    const auto take = [&](laq_seq & seq) {
        seq.pinned    = pinned;
        seq.phase.how = seq.phase.probed() ? laq_read_how::WHOLE : seq.phase.how;
    };
    std::for_each(seqs.begin(), seqs.end(), take);
    std::for_each(parked.begin(), parked.end(), [&](const auto & other) { take(other->seq); });
}

laq_params laq_context::params_of(int32_t seq_id) const {
    laq_params p = params;
    p.pinned     = seqs[seq_id].pinned.data();
    p.n_pinned   = seqs[seq_id].pinned.size();
    return p;
}

//
// what is there
//

int32_t laq_context::n_tokens(int32_t seq_id) const {
    // where the intact suffix was removed and no other token is held, its beginning is where tokens go on
    return std::max(store.cells(seq_id).seq_pos_max(seq_id) + 1, seqs[seq_id].n_intact);
}

uint32_t laq_context::n_over(int32_t seq_id) const {
    const uint32_t n = n_resident(seq_id);
    return params.policy == LAQ_POLICY_FULL ? 0 : n - std::min(n, params.n_kv_budget);
}

uint32_t laq_context::n_room(int32_t seq_id) const {
    return n_resident(seq_id) + store.n_free(seq_id);
}

bool laq_context::attends(int32_t seq_id) const {
    const laq_seq & seq   = seqs[seq_id];
    const bool      ahead = seq.phase.is(laq_phase::WAITING);
    return archives[seq_id] && seq.n_intact > 0 && seq.phase.attending() && !(ahead && facts.ahead_from_cells);
}

int32_t laq_context::intact_from(int32_t seq_id, int32_t n_prompt) const {
    return std::max(seqs[seq_id].n_intact, n_prompt - (int32_t) laq_policy_window(params));
}

// Queries below n_intact do not observe: heads hold different tokens there, and one mask would not do for all.
std::vector<laq_observed> laq_context::observed(int32_t seq_id, const laq_query_range & queries, bool by_probe) const {
    const laq_seq &  seq   = seqs[seq_id];
    const laq_ring & ring  = by_probe ? scratch : seq.ring;
    const int32_t    first = std::max({ queries.first, seq.n_intact, queries.last - (int32_t) ring.size() });

    std::vector<laq_observed> res;
    for (int32_t pos = first; pos < queries.last; ++pos) {
        if (ring.has(pos)) {
            res.push_back({ ring.slot_of(pos), pos, ring.output_of(pos) });
        }
    }
    return res;
}

void laq_context::reset(int32_t seq_id) {
    seqs[seq_id].reset();
    if (archives[seq_id]) {
        archives[seq_id]->clear();
    }
}

//
// memory
//

// Tokens that a fit is reserved for: those of an eviction, and where a recall brings together what a lookahead sees,
// those
static uint32_t n_fit_max(const laq_context & laq) {
    const bool whole = laq.params.archive != 0 && laq.facts.ahead_from_cells;
    return whole ? laq.store.n_cells() : std::min(laq.store.n_cells(), laq.params.n_kv_budget + laq.params.n_lookahead);
}

static void reserve_scores(laq_context & laq) {
    const uint32_t  n_q = std::max(laq.seqs[0].ring.size(), laq.scratch.size());
    laq_score_nodes nodes(laq.compute.ctx(), laq.store.n_cells(), n_q);

    laq.stats.score_fused = laq_graph_score_cells(laq.compute, nodes, laq.store, 0);
    laq.compute.reserve("the score graph: use a smaller kv_staging, kv_budget or window_size");
}

// a recall scores one layer at a time: all have the shape of the first, or it grows with another
static void reserve_recall(laq_context & laq) {
    for (uint32_t ikv = 0; ikv < laq.store.layers.size(); ++ikv) {
        laq_columns            columns(laq.store, *laq.archives[0]);
        const laq_columns_part part = { columns, ikv, 0 };
        laq.compute.begin();
        laq_score_nodes nodes(laq.compute.ctx(),
                              GGML_PAD((int64_t) laq.n_ctx + laq.params.n_lookahead, laq_archive::N_BLOCK),
                              laq.seqs[0].ring.size());
        laq_graph_score_columns(laq.compute, nodes, 0, part, laq.store.n_cells());
        laq.compute.reserve("the keys of all tokens of a layer: use a smaller n_ctx");
    }
}

void laq_context::reserve() {
    for (const laq_layer & layer : store.layers) {
        if (layer.has_bias) {
            throw laq_error(LAQ_STATUS_UNSUPPORTED, "models with an attention bias cannot be evicted: unset kv_budget");
        }
    }
    if (params.policy == LAQ_POLICY_FULL) {
        return;
    }
    if (facts.by_graph) {
        compute.begin();
        laq_graph_moves(compute, store, 0, store.n_cells(), store.n_cells());
        compute.reserve("the graph that moves K and V: use a smaller kv_staging");
    }
    if (laq_policy_needs_queries(params)) {
        compute.begin();
        reserve_scores(*this);
    }
    if (params.archive != 0) {
        reserve_recall(*this);
    }
    if (laq_policy_fits(params)) {
        const uint32_t n = n_fit_max(*this);
        compute.begin();
        laq_graph_fit(compute, store, 0, n, store.n_cells(), std::min(seqs[0].ring.size(), LAQ_FIT_QUERIES),
                      &params.value_fit);
        compute.reserve("the fit of values: use value_fit = 0");
    }
    compute.begin();
}

uint64_t laq_context::compute_bytes() const {
    ggml_backend_sched_t sched = ctx->get_sched();

    uint64_t res = compute.bytes();
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        res += ggml_backend_sched_get_buffer_size(sched, ggml_backend_sched_get_backend(sched, i));
    }
    return res;
}
