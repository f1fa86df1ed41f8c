// Evictions: what triggers one, what scores it, what stays.

#include "laq-cache.h"
#include "laq-recall.h"
#include "laq-threads.h"

#include "ggml.h"
#include "llama-impl.h"

#include <algorithm>

std::vector<uint32_t> laq_keep_of_head(const laq_params & params, uint32_t ikv, uint32_t h, const laq_head_view & view,
                                       uint32_t n_shared) {
    laq_params p = params;
    p.n_kv_budget -= std::min(p.n_kv_budget, n_shared);

    const std::vector<uint8_t> pinned   = laq_pinned(p, view);
    const uint32_t             n_pinned = std::count(pinned.begin(), pinned.end(), 1);
    if (n_pinned > p.n_kv_budget) {
        throw laq_error(LAQ_STATUS_INVALID_ARGUMENT,
                        std::to_string(n_pinned + n_shared) + " tokens of the sequence are pinned or shared with " +
                            "another one (llama_memory_seq_cp), kv_budget = " + std::to_string(params.n_kv_budget) +
                            ": raise kv_budget or pin and share less");
    }
    return laq_select_keys(p, ikv, h, view, pinned.data());
}

void laq_cache::remember(int32_t seq_id, const std::vector<uint32_t> & order, laq_scores & now) const {
    for (uint32_t ikv = 0; ikv < now.rows.size(); ++ikv) {
        for (uint32_t h = 0; h < layers[ikv].n_head_kv; ++h) {
            const float * memory = layers[ikv].memory.data() + (size_t) h * n_cells();
            float *       s      = now.rows[ikv].data() + h * order.size();
            for (size_t i = 0; i < order.size(); ++i) {
                s[i] /= (float) now.n_queries;
                if (seqs[seq_id].remembers && cells().pos_get(order[i]) < seqs[seq_id].n_intact) {
                    s[i] = laq_joined(s[i], memory[order[i]]);
                }
            }
        }
    }
}

void laq_cache::memorize(const std::vector<uint32_t> & dst, const laq_kept & kept, const laq_scores & now) {
    for (uint32_t ikv = 0; ikv < now.rows.size(); ++ikv) {
        const size_t n_row = now.rows[ikv].size() / layers[ikv].n_head_kv;
        for (uint32_t h = 0; h < layers[ikv].n_head_kv; ++h) {
            float *       memory = layers[ikv].memory.data() + (size_t) h * n_cells();
            const float * row    = now.rows[ikv].data() + h * n_row;
            for (size_t i = 0; i < dst.size(); ++i) {
                memory[dst[i]] = row[kept[ikv][h][i]];
            }
        }
    }
}

laq_kept laq_cache::select(const laq_eviction & e, const std::vector<uint32_t> & order,
                           const std::vector<uint8_t> & own, const laq_scores & scores) {
    laq_params p  = params_of(e.seq_id);
    p.n_kv_budget = e.n_keep;
    if (scores.rows.empty() && laq_policy_needs_queries(p)) {
        if (e.queries.first < e.queries.last) {
            LLAMA_LOG_WARN("%s: the queries of the last tokens went with tokens that were removed: the newest ones "
                           "stay\n",
                           __func__);
        }
        p.policy = LAQ_POLICY_STREAMING;
    }

    // what may stay: the sequence's own cells before n_end, and where they are in `order`
    std::vector<uint32_t> at;
    for (uint32_t i = 0; i < order.size(); ++i) {
        if (own[i] && cells().pos_get(order[i]) < e.n_end) {
            at.push_back(i);
        }
    }
    const uint32_t n_shared = std::count(own.begin(), own.end(), 0);

    const auto choose = [&](uint32_t ikv, uint32_t h) {
        std::vector<int32_t> pos(at.size());
        std::vector<float>   s(scores.rows.empty() ? 0 : at.size());
        for (uint32_t i = 0; i < at.size(); ++i) {
            pos[i] = pos_at(e.seq_id, ikv, h, order[at[i]]);
        }
        for (uint32_t i = 0; i < s.size(); ++i) {
            s[i] = scores.rows[ikv][h * order.size() + at[i]];
        }
        const float *         of_head = s.empty() ? nullptr : s.data();
        std::vector<uint32_t> kept =
            laq_keep_of_head(p, ikv, h, { pos.data(), of_head, (uint32_t) at.size(), e.n_intact }, n_shared);
        for (uint32_t & i : kept) {
            i = at[i];
        }
        return kept;
    };

    laq_kept res(layers.size());
    laq_parallel(layers.size(), n_head_kv_max() * at.size(), n_threads(), [&](uint32_t ikv) {
        for (uint32_t h = 0; h < layers[ikv].n_head_kv; ++h) {
            res[ikv].push_back(choose(ikv, h));
        }
    });
    return res;
}

// cells that another sequence shares stay: from now on the tables answer for them, too
void laq_cache::settle_shared(int32_t seq_id, const std::vector<uint32_t> & order, const std::vector<uint8_t> & own) {
    for (size_t i = 0; i < order.size(); ++i) {
        for (uint32_t ikv = 0; ikv < layers.size() && !own[i]; ++ikv) {
            for (uint32_t h = 0; h < layers[ikv].n_head_kv; ++h) {
                const size_t at = (size_t) h * n_cells() + order[i];

                layers[ikv].origin[at] = pos_at(seq_id, ikv, h, order[i]);
                layers[ikv].memory[at] = 0.0f;
            }
        }
    }
}

static uint32_t n_before(const laq_cache & laq, const std::vector<uint32_t> & order, int32_t n_end) {
    return std::count_if(order.begin(), order.end(), [&](uint32_t c) { return laq.cells().pos_get(c) < n_end; });
}

std::vector<laq_observation> laq_last_fitted(std::vector<laq_observation> obs, uint32_t n_fit) {
    obs.erase(obs.begin(), obs.end() - std::min<size_t>(obs.size(), n_fit));
    return obs;
}

bool laq_all_exact(const std::vector<laq_observation> & obs) {
    return std::all_of(obs.begin(), obs.end(), [](const auto & o) { return o.exact; });
}

bool laq_cache::fits_to_archive() const {
    return recall && laq_policy_fits(params) && recall->archive.can_hold() && recall->scorer.on_cpu();
}

bool laq_cache::observes_archive(int32_t seq_id, const std::vector<uint32_t> & order) const {
    return fits_to_archive() && !laq_holds_archive(*this, seq_id, order);
}

std::vector<laq_observation> laq_cache::fitted_to(const laq_eviction & e, const std::vector<uint32_t> & order) {
    if (observes_archive(e.seq_id, order)) {
        const std::vector<laq_observation> res = laq_last_fitted(laq_observations(*this, e), e.n_fit);
        if (!res.empty() && !laq_all_exact(res)) {
            observe_archive(e, order, res);
        }
        return res;
    }
    // what they got themselves counts, as long as it is of what the cells hold
    std::vector<laq_observation> res = laq_observations(*this, e);
    res.erase(std::remove_if(res.begin(), res.end(),
                             [&](const laq_observation & o) { return o.pos < seqs[e.seq_id].n_settled; }),
              res.end());
    return laq_last_fitted(std::move(res), e.n_fit);
}

// what is kept, and what was decoded ahead with it where that is asked for
static laq_rows rows_of(const laq_cache & laq, const laq_eviction & e, const std::vector<uint32_t> & order,
                        const laq_kept & kept, bool with_ahead) {
    const uint32_t first_ahead = with_ahead ? n_before(laq, order, e.n_end) : order.size();

    laq_rows res(kept.size());
    laq_parallel(kept.size(), laq.n_head_kv_max() * kept[0][0].size(), laq.n_threads(), [&](uint32_t ikv) {
        for (uint32_t h = 0; h < kept[ikv].size(); ++h) {
            std::vector<laq_row> & rows = res[ikv].emplace_back();
            rows.reserve(kept[ikv][h].size() + order.size() - first_ahead);
            for (const uint32_t i : kept[ikv][h]) {
                rows.push_back({ laq.pos_at(e.seq_id, ikv, h, order[i]), (int32_t) order[i] });
            }
            for (uint32_t i = first_ahead; i < order.size(); ++i) {
                rows.push_back({ laq.cells().pos_get(order[i]), (int32_t) order[i] });
            }
        }
    });
    return res;
}

// Whose queries values are fitted to. While a prompt is read, what is read next is most like what was read last: not the
// probe's. Before n_intact heads hold different tokens.
static laq_eviction fitted_by(const laq_eviction & e) {
    laq_eviction by = e;
    if (e.scratch) {
        by.scratch = false;
        by.queries = { e.n_intact, e.n_end };
    }
    return by;
}

void laq_cache::drop(std::vector<uint32_t> & cells, uint32_t n_kept) {
    for (size_t i = n_kept; i < cells.size(); ++i) {
        kv->v_cells[0].rm(cells[i]);
    }
    cells.resize(n_kept);
    kv->v_heads[0] = seqs.size() == 1 ? n_kept : 0;
}

// cells that another sequence shares stay where they are, whole
static std::vector<uint8_t> owned(const laq_cache & laq, const std::vector<uint32_t> & order) {
    std::vector<uint8_t> own(order.size());
    std::transform(order.begin(), order.end(), own.begin(),
                   [&](uint32_t cell) { return laq.cells().seq_count(cell) == 1; });
    return own;
}

// The re-selection of an eviction. What fits to the archive passes over it anyhow: it is not skipped, so that V starts from
// what it was and not from an earlier fit.
static laq_eviction recalling(const laq_cache & laq, const laq_eviction & e, const std::vector<uint32_t> & order) {
    laq_eviction res = e;
    res.always |= laq.observes_archive(e.seq_id, order);
    return res;
}

bool laq_cache::choose_again(const laq_eviction & e) {
    ctx->synchronize();
    const std::vector<uint32_t> order = resident(e.seq_id);
    laq_archive_leaving(*this, e, order);
    return reselect(e, order, owned(*this, order));
}

void laq_cache::evict(const laq_eviction & e) {
    ctx->synchronize();  // K and V are read and moved by other ways than the stream that writes them
    seqs[e.seq_id].attending = false;

    const std::vector<uint32_t> order = resident(e.seq_id);
    const std::vector<uint8_t>  own   = owned(*this, order);
    if (recall) {
        laq_archive_leaving(*this, e, order);
    }
    if (e.recall && (reselect(recalling(*this, e, order), order, own) || n_before(*this, order, e.n_end) <= e.n_keep)) {
        return;
    }
    const int64_t t_begin = ggml_time_us();

    laq_scores now;
    if (laq_policy_needs_queries(params)) {
        now = score(e, order);
    }
    if (debug) {
        scores[stats.n_evictions % N_DEBUG] = now.rows;
    }
    laq_seq & seq = seqs[e.seq_id];
    if (laq_policy_needs_lookahead(params) && (e.scratch || seq.remembers)) {
        remember(e.seq_id, order, now);
    }
    const int64_t  t_scored = ggml_time_us();
    const laq_kept kept     = select(e, order, own, now);
    const int64_t  t0       = ggml_time_us();
    settle_shared(e.seq_id, order, own);

    // while a prompt is read, only where the archive has V as it was: fitted to the fitted, it drifts from chunk to chunk
    const bool         fits = laq_policy_fits(params) && (!e.scratch || fits_to_archive()) && !now.rows.empty() &&
                              !std::count(own.begin(), own.end(), 0);
    const laq_eviction by   = fitted_by(e);
    std::vector<laq_observation> obs;
    int64_t                      t_observed = t0;
    if (fits) {
        obs        = fitted_to(by, order);
        t_observed = ggml_time_us();
    }
    // what is dropped goes after the fit: its queries see it, and it has their outputs
    std::vector<uint32_t> dst = compact(e, order, own, rows_of(*this, e, order, kept, fits && !e.scratch));
    if (e.scratch) {
        memorize(dst, kept, now);
    }
    seq.n_intact    = e.n_intact;
    seq.remembers   = e.scratch;
    const int64_t t = ggml_time_us();
    if (fits) {
        fit_values(by, obs, dst);
        drop(dst, kept[0][0].size());
        seq.fitted |= !obs.empty();
    }
    seq.n_settled = e.n_end;
    seq.ring.forget(e.n_end);
    stats.ms_score += (t_scored - t_begin) / 1000.0;
    stats.ms_select += (t0 - t_scored) / 1000.0;
    stats.ms_fit += (t_observed - t0) / 1000.0;
    stats.ms_compact += (t - t_observed) / 1000.0;
    ++stats.n_evictions;
}

int32_t laq_cache::intact_from(int32_t seq_id, int32_t n_prompt) const {
    return std::max(seqs[seq_id].n_intact, n_prompt - (int32_t) laq_policy_window(params));
}

int32_t laq_cache::intact_in_prompt(int32_t seq_id, int32_t n_past, uint32_t n_keep) const {
    uint32_t n_window = laq_policy_window(params);
    if (fits_to_archive()) {
        // the queries that values are fitted to see what every head holds, or one mask would not do for all
        laq_params p  = params_of(seq_id);
        p.n_kv_budget = n_keep;
        p.n_reread    = LAQ_FIT_QUERIES;
        n_window      = std::max(n_window, laq_policy_reread(p));
    }
    return std::max(seqs[seq_id].n_intact, n_past - (int32_t) n_window);
}

void laq_cache::evict_to(int32_t seq_id, uint32_t n_keep, bool recall) {
    const int32_t n_end    = n_tokens(seq_id);
    const int32_t n_prompt = std::max(0, n_end - (int32_t) laq_policy_ahead(params));

    evict({ seq_id, n_keep, laq_policy_queries(params, n_prompt, n_end), false, intact_from(seq_id, n_prompt), n_end,
            recall });
    seqs[seq_id].pending.reset();
}

void laq_cache::overflow(int32_t seq_id) {
    // an eviction that waits is the turn's own
    const laq_recall_when when = seqs[seq_id].pending ? LAQ_RECALL_TURN : LAQ_RECALL_ALWAYS;
    evict_to(seq_id, params.n_kv_budget, recalls(seq_id, when));
}

bool laq_cache::can_evict(int32_t seq_id) const {
    const auto & pending = seqs[seq_id].pending;
    return pending && n_tokens(seq_id) >= pending->n_prompt + (int32_t) params.n_lookahead;
}

void laq_cache::evict_pending(int32_t seq_id, laq_recall_when when) {
    laq_seq &     seq   = seqs[seq_id];
    const int32_t n_end = n_tokens(seq_id);
    // no more than n_lookahead tokens are ahead, or the window would not fit the budget
    const int32_t n_prompt = std::max(seq.pending->n_prompt, n_end - (int32_t) params.n_lookahead);

    seq.pending.reset();
    const bool recall = recalls(seq_id, when);
    if (n_resident(seq_id) > params.n_kv_budget || recall) {
        evict({ seq_id, params.n_kv_budget, laq_policy_queries(params, n_prompt, n_end), false,
                intact_from(seq_id, n_prompt), n_end, recall });
    }
}

bool laq_cache::can_make_room() const {
    if (params.policy == LAQ_POLICY_FULL || n_cells() - n_used() >= n_wanted) {
        return false;
    }
    uint32_t n_over = 0;
    for (uint32_t s = 0; s < seqs.size(); ++s) {
        n_over += n_resident(s) - std::min(n_resident(s), params.n_kv_budget);
    }
    return n_cells() - n_used() + n_over >= n_wanted;
}

void laq_cache::make_room() {
    for (uint32_t s = 0; s < seqs.size() && n_cells() - n_used() < n_wanted; ++s) {
        if (n_resident(s) > params.n_kv_budget) {
            overflow(s);
        }
    }
}

void laq_cache::run_update(std::function<void()> j) {
    job    = std::move(j);
    status = LAQ_STATUS_OK;
    ctx->memory_update(false);
    job = nullptr;
    if (status != LAQ_STATUS_OK) {
        throw laq_error(status, error);
    }
}
