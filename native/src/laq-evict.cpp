// The eviction itself, and the hooks through which llama_kv_cache asks for it.

#include "laq-cache.h"

#include "ggml-backend.h"
#include "ggml.h"
#include "llama-impl.h"

#include <algorithm>

//
// laq_cache
//

std::vector<int32_t> laq_cache::ring_slots(laq_query_range range) const {
    std::vector<int32_t> res;
    for (int32_t pos = std::max(range.first, range.last - (int32_t) n_ring); pos < range.last; ++pos) {
        const int32_t slot = pos % (int32_t) n_ring;
        if (ring_pos[slot] == pos) {
            res.push_back(slot);
        }
    }
    return res;
}

void laq_cache::forget_queries(int32_t p0) {
    for (int32_t & pos : ring_pos) {
        pos = pos >= p0 ? -1 : pos;
    }
}

laq_kept laq_cache::select(const laq_params & p, int32_t n_prompt, int32_t n_end, int32_t * n_intact) {
    std::vector<uint32_t> order = resident();

    const int64_t t0 = ggml_time_us();

    std::vector<std::vector<float>> raw;
    if (laq_policy_needs_queries(p)) {
        raw = score(laq_policy_queries(p, n_prompt, n_tokens()), order);
    }

    const int64_t t1 = ggml_time_us();

    const auto before = [&](uint32_t cell, int32_t pos) { return cells().pos_get(cell) < pos; };

    const uint32_t n_all = order.size();
    const uint32_t n     = std::lower_bound(order.begin(), order.end(), n_end, before) - order.begin();

    *n_intact = std::max(origin.n_intact, n_prompt - (int32_t) laq_policy_window(p));

    laq_kept             res(layers.size());
    std::vector<int32_t> pos(n);
    for (uint32_t ikv = 0; ikv < layers.size(); ++ikv) {
        for (uint32_t h = 0; h < layers[ikv].n_head_kv; ++h) {
            for (uint32_t i = 0; i < n; ++i) {
                pos[i] = pos_at(ikv, h, order[i]);
            }
            const float * s = raw.empty() ? nullptr : raw[ikv].data() + (size_t) h * n_all;
            res[ikv].push_back(laq_select_head(p, ikv, h, { pos.data(), s, n, *n_intact }));
        }
    }
    if (debug) {
        scores = std::move(raw);
    }
    stats.ms_score += (t1 - t0) / 1000.0;
    stats.ms_select += (ggml_time_us() - t1) / 1000.0;
    return res;
}

void laq_cache::evict(int32_t n_prompt, int32_t n_end) {
    int32_t        n_intact = 0;
    const laq_kept kept     = select(params, n_prompt, n_end, &n_intact);

    const int64_t t0 = ggml_time_us();
    rebuild(laq_pad_cells(kept[0][0].size() + 1, n_cells_max), kept, n_intact);
    forget_queries(n_end);
    stats.ms_compact += (ggml_time_us() - t0) / 1000.0;
    ++stats.n_evictions;
}

bool laq_cache::can_evict() const {
    return pending && params.lookahead == LAQ_LOOKAHEAD_DEFERRED &&
           n_tokens() >= pending->n_prompt + (int32_t) params.n_lookahead;
}

void laq_cache::evict_pending() {
    // no more than n_lookahead tokens are ahead, or the window would not fit the budget
    const int32_t n_prompt = std::max(pending->n_prompt, n_tokens() - (int32_t) params.n_lookahead);
    pending.reset();
    if (n_resident() > params.n_kv_budget) {
        evict(n_prompt, n_tokens());
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

void laq_cache::reset() {
    origin  = {};
    pending = std::nullopt;
    ring_pos.assign(n_ring, -1);
    if (saved) {
        origin   = std::move(saved->origin);
        pending  = saved->pending;
        ring_pos = std::move(saved->ring_pos);
        saved.reset();
    }
}

//
// hooks
//

void laq_kv_clear(laq_cache & laq) {
    laq.reset();
}

bool laq_kv_seq_rm(laq_cache & laq, int32_t seq_id, int32_t p0, int32_t p1) {
    if (seq_id > 0) {
        // the only sequence is 0: there is nothing to remove
        return true;
    }
    if (p0 == 0 && p1 >= laq.n_tokens()) {
        laq.reset();
        return true;
    }
    const bool removes = p0 < std::min(p1, laq.n_tokens());
    if (removes && p0 < laq.origin.n_intact) {
        LLAMA_LOG_DEBUG("%s: positions below %d have been evicted, [%d, %d) cannot be removed\n", __func__,
                        laq.origin.n_intact, p0, p1);
        return false;
    }
    if (removes) {
        laq.forget_queries(p0);
        if (laq.pending && p0 < laq.pending->n_prompt) {
            laq.pending.reset();
        }
    }
    return true;
}

bool laq_kv_refuse(const laq_cache &, const char * what) {
    LLAMA_LOG_ERROR("%s: not possible with kv_budget: cells hold tokens of different positions of one sequence\n",
                    what);
    return true;
}

uint32_t laq_kv_pad(const laq_cache & laq) {
    // The CPU gives each thread an equal share of the cells, empty ones included, and those at the end cost nothing:
    // on a small cache upstream's 256 leave half of the threads idle. As upstream as long as nothing was evicted.
    const bool small = laq.origin.n_intact > 0 && ggml_backend_buffer_is_host(laq.k(0)->buffer);
    return small ? 32 : 256;
}

void laq_kv_no_slot(laq_cache & laq, uint32_t n_tokens) {
    laq.n_grow = n_tokens;
}

bool laq_kv_has_update(laq_cache & laq, bool optimize) {
    if (optimize) {
        const bool grow = laq.n_grow > 0 && laq.n_resident() + laq.n_grow <= laq.n_cells_max;
        laq.n_grow      = grow ? laq.n_grow : 0;
        return grow;
    }
    return laq.job || laq.can_evict();
}

bool laq_kv_update(laq_cache & laq) {
    laq.status = LAQ_STATUS_OK;
    try {
        if (laq.job) {
            laq.job();
        } else if (laq.n_grow > 0) {
            laq.rebuild(laq_pad_cells(laq.n_resident() + laq.n_grow, laq.n_cells_max), {}, 0);
        } else {
            laq.evict_pending();
        }
    } catch (const laq_error & e) {
        laq.status = e.status;
        laq.error  = e.what();
    } catch (const std::exception & e) {
        laq.status = LAQ_STATUS_INTERNAL;
        laq.error  = e.what();
    }
    laq.n_grow = 0;
    if (laq.status != LAQ_STATUS_OK) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, laq.error.c_str());
    }
    return laq.status == LAQ_STATUS_OK;
}
