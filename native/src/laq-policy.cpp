#include "laq-policy.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>

void laq_pool(const float * src, float * dst, uint32_t n, uint32_t n_kernel, laq_pooling pooling) {
    const int64_t r = n_kernel / 2;
    if (pooling == LAQ_POOLING_NONE || n_kernel <= 1) {
        std::copy(src, src + n, dst);
        return;
    }
    if (pooling == LAQ_POOLING_MAX) {
        std::copy(src, src + n, dst);
        for (int64_t o = 1; o <= r && o < (int64_t) n; ++o) {
            for (int64_t i = 0; i < (int64_t) n - o; ++i) {
                dst[i] = std::max(dst[i], src[i + o]);
            }
            for (int64_t i = o; i < (int64_t) n; ++i) {
                dst[i] = std::max(dst[i], src[i - o]);
            }
        }
        return;
    }
    for (int64_t i = 0; i < (int64_t) n; ++i) {
        float sum = 0.0f;
        for (int64_t o = -r; o <= r; ++o) {
            sum += i + o >= 0 && i + o < (int64_t) n ? src[i + o] : 0.0f;
        }
        dst[i] = sum / (float) n_kernel;
    }
}

void laq_follow(const float * src, const int32_t * pos, float * dst, uint32_t n, uint32_t n_follow) {
    // indices in reach whose score no later one exceeds: the first of them is the maximum
    std::vector<uint32_t> queue(n);
    uint32_t              head = 0;
    uint32_t              tail = 0;
    for (uint32_t i = 0; i < n; ++i) {
        while (tail > head && src[queue[tail - 1]] <= src[i]) {
            --tail;
        }
        queue[tail++] = i;
        while ((int64_t) pos[queue[head]] < (int64_t) pos[i] - n_follow) {
            ++head;
        }
        dst[i] = src[queue[head]];
    }
}

// integers that are ordered as the numbers are
static uint32_t ordered(float x) {
    uint32_t bits;
    x += 0.0f;  // 0 for -0
    memcpy(&bits, &x, sizeof(bits));
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

std::vector<uint32_t> laq_top(const float * scores, const uint8_t * pinned, uint32_t n, uint32_t n_budget) {
    std::vector<uint32_t> res(std::min(n, n_budget));
    std::iota(res.begin(), res.end(), 0u);
    if (n <= n_budget || n_budget == 0) {
        return res;
    }
    // One number for each entry, the larger the better: pinned, then score, then the lower index. No two are equal, so
    // the result does not depend on the algorithm.
    std::vector<uint64_t> keys(n);
    for (uint32_t i = 0; i < n; ++i) {
        keys[i] = (uint64_t) (pinned[i] ? UINT32_MAX : ordered(scores[i])) << 32 | (UINT32_MAX - i);
    }
    std::vector<uint64_t> best(keys);
    std::nth_element(best.begin(), best.begin() + (n_budget - 1), best.end(), std::greater<uint64_t>());
    const uint64_t last = best[n_budget - 1];
    for (uint32_t i = 0, n_res = 0; n_res < n_budget; ++i) {
        res[n_res] = i;
        n_res += keys[i] >= last;
    }
    return res;
}

float laq_random_score(uint32_t seed, uint32_t ikv, uint32_t head, int32_t pos) {
    const uint64_t x = seed * 0x9E3779B97F4A7C15ull + ikv * 0xBF58476D1CE4E5B9ull + head * 0x94D049BB133111EBull +
                       (uint64_t) (int64_t) pos;

    uint64_t z = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    z          = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    return (float) (z >> 40) * (1.0f / 16777216.0f);
}

std::vector<float> laq_rank(const laq_params & params, uint32_t ikv, uint32_t head, const laq_head_view & view,
                            const uint8_t * pinned) {
    std::vector<float> res(view.n);
    if (laq_policy_needs_queries(params)) {
        std::vector<float> raw(view.scores, view.scores + view.n);
        for (uint32_t i = 0; i < view.n; ++i) {
            raw[i] = pinned[i] ? 0.0f : raw[i];
        }
        laq_pool(raw.data(), res.data(), view.n, params.n_kernel, (laq_pooling) params.pooling);
        return res;
    }
    for (uint32_t i = 0; i < view.n; ++i) {
        res[i] =
            params.policy == LAQ_POLICY_RANDOM ? laq_random_score(params.seed, ikv, head, view.pos[i]) : view.pos[i];
    }
    return res;
}

bool laq_copies(const float * scores, const uint8_t * pinned, uint32_t n) {
    // summed in double from left to right, as the reference does: both decide alike
    double total = 0.0;
    double best  = 0.0;
    for (uint32_t i = 0; i < n; ++i) {
        if (!pinned[i]) {
            total += (double) scores[i];
            best = std::max(best, (double) scores[i]);
        }
    }
    return best > 0.0 && best >= LAQ_COPY_SHARE * total;
}

std::vector<uint32_t> laq_select_keys(const laq_params & params, uint32_t ikv, uint32_t head,
                                      const laq_head_view & view, const uint8_t * pinned) {
    const std::vector<float> rank     = laq_rank(params, ikv, head, view, pinned);
    const uint32_t           n_budget = params.n_kv_budget;
    const uint32_t           n_pinned = std::accumulate(pinned, pinned + view.n, 0u);

    const bool follows = laq_policy_needs_lookahead(params) && params.n_follow > 0 && n_pinned < n_budget;
    if (!follows || !laq_copies(view.scores, pinned, view.n)) {
        return laq_top(rank.data(), pinned, view.n, n_budget);
    }
    const uint32_t n_after = (uint32_t) ((uint64_t) 3 * (n_budget - n_pinned) / 8);

    std::vector<uint8_t> first(pinned, pinned + view.n);
    for (uint32_t i : laq_top(rank.data(), pinned, view.n, n_budget - n_after)) {
        first[i] = 1;
    }
    std::vector<float> followed(view.n);
    laq_follow(rank.data(), view.pos, followed.data(), view.n, params.n_follow);
    return laq_top(followed.data(), first.data(), view.n, n_budget);
}

std::vector<uint8_t> laq_pinned(const laq_params & params, const laq_head_view & view) {
    std::vector<uint8_t> pinned(view.n);
    for (uint32_t i = 0; i < view.n; ++i) {
        const int32_t pos = view.pos[i];

        bool pin = pos < (int32_t) params.n_sink || pos >= view.n_intact;
        for (uint32_t s = 0; s < params.n_pinned && !pin; ++s) {
            pin = pos >= params.pinned[s].p0 && pos < params.pinned[s].p1;
        }
        pinned[i] = pin;
    }
    return pinned;
}

laq_query_range laq_policy_queries(const laq_params & params, int32_t n_prompt, int32_t n_end) {
    const int32_t ahead  = std::min(n_end, n_prompt + (int32_t) params.n_lookahead);
    const int32_t window = std::max<int32_t>(0, n_prompt - (int32_t) laq_policy_window(params));
    switch (params.policy) {
        // nothing decoded ahead: the prompt's last queries are all there is
        case LAQ_POLICY_LAQ:    return { ahead > n_prompt ? n_prompt : window, ahead };
        case LAQ_POLICY_LAQ_PP: return { window, ahead };
        case LAQ_POLICY_SNAPKV: return { window, n_prompt };
        default:                return { 0, 0 };
    }
}

uint32_t laq_policy_window(const laq_params & params) {
    return params.policy == LAQ_POLICY_SNAPKV ? params.n_window_snapkv : params.n_window;
}

bool laq_policy_needs_queries(const laq_params & params) {
    return params.policy == LAQ_POLICY_LAQ || params.policy == LAQ_POLICY_LAQ_PP || params.policy == LAQ_POLICY_SNAPKV;
}

bool laq_policy_needs_lookahead(const laq_params & params) {
    return params.policy == LAQ_POLICY_LAQ || params.policy == LAQ_POLICY_LAQ_PP;
}

bool laq_policy_fits(const laq_params & params) {
    return params.policy == LAQ_POLICY_LAQ_PP && params.value_fit > 0.0f;
}

uint32_t laq_policy_beside_ahead(const laq_params & params, uint32_t n_room) {
    return std::max(params.n_kv_budget, n_room - std::min(n_room, laq_policy_ahead(params)));
}

uint32_t laq_policy_ahead(const laq_params & params) {
    return laq_policy_needs_lookahead(params) ? params.n_lookahead : 0;
}

uint32_t laq_policy_probe_ahead(const laq_params & params) {
    return std::min(laq_policy_ahead(params), LAQ_PROBE_AHEAD);
}

uint32_t laq_policy_room(const laq_params & params) {
    if (!laq_policy_needs_lookahead(params)) {
        return 0;
    }
    return std::max(params.n_probe + laq_policy_probe_ahead(params), params.n_lookahead);
}

uint32_t laq_policy_chunk(const laq_params & params, uint32_t n_cells) {
    const uint32_t room = laq_policy_room(params);
    return params.n_chunk ? params.n_chunk : std::max(32u, (n_cells - std::min(n_cells, room)) / 3);
}

laq_chunk laq_plan_chunk(const laq_params * params, uint32_t n_cells, uint32_t n_used, uint32_t n_resident,
                         uint32_t n_left, uint32_t n_batch) {
    const laq_params & p = *params;

    const int64_t ahead = laq_policy_ahead(p);
    const int64_t room  = laq_policy_room(p);
    const int64_t free  = (int64_t) n_cells - n_used;

    if (p.policy == LAQ_POLICY_FULL) {
        return { (uint32_t) std::max<int64_t>(0, std::min<int64_t>({ n_left, n_batch, free })), 0, 0 };
    }
    // the rest of the prompt fits: it is evicted once, with all of it in view. So it is, with less to look ahead in,
    // where nothing could be evicted now
    if (n_left + ahead <= free || (n_left <= free && n_resident <= p.n_kv_budget)) {
        return { std::min(n_left, n_batch), 0, 0 };
    }
    const int64_t step = std::min<int64_t>({ n_batch, n_left, p.n_chunk ? p.n_chunk : n_batch });
    if (free - room >= step) {
        return { (uint32_t) step, 0, 0 };
    }
    // keep the cells full: only what the next chunk needs goes
    const int64_t n_over   = std::max<int64_t>(0, (int64_t) n_resident - p.n_kv_budget);
    const int64_t n_evict  = std::min(step + room - free, n_over);
    const int64_t n_tokens = std::min(step, free + n_evict - room);

    int64_t n_probe = 0;
    if (laq_policy_needs_lookahead(p)) {
        n_probe = std::min<int64_t>({ p.n_probe, n_left, free - laq_policy_probe_ahead(p) });
    }
    if (n_tokens < 1 || (room > 0 && n_probe < 1)) {
        return { 0, 0, 0 };
    }
    return { (uint32_t) n_tokens, (uint32_t) n_evict, (uint32_t) n_probe };
}

laq_chunk laq_plan_attending(const laq_params & params, const laq_attending & now) {
    const uint32_t n_cells = now.n_cells - std::min(now.n_cells, laq_policy_ahead(params));

    // no probe takes cells, only the lookahead from the prompt's end
    laq_params p = params;
    p.policy     = LAQ_POLICY_SNAPKV;

    laq_chunk plan = laq_plan_chunk(&p, n_cells, now.n_used, now.n_resident, now.n_left, now.n_batch);
    if (plan.n_evict > 0) {
        plan.n_evict  = now.n_resident - params.n_kv_budget;
        plan.n_tokens = std::min(now.n_left, now.n_batch);
    }
    if (plan.n_evict > 0 || now.evicted) {
        // two halves and no small rest: ggml's CPU backend sums the attention of fewer than 64 tokens in another order
        const bool is_end = now.n_left > now.n_attend && now.n_left < 2 * now.n_attend;
        plan.n_tokens     = std::min(plan.n_tokens, is_end ? (now.n_left + 1) / 2 : now.n_attend);
    }
    const uint32_t n_free = n_cells - std::min(n_cells, now.n_used - plan.n_evict);
    plan.n_tokens         = std::min(plan.n_tokens, n_free);
    return plan;
}

uint32_t laq_policy_n_pinned(const laq_params & params) {
    std::vector<laq_span> spans(params.pinned, params.pinned + params.n_pinned);
    spans.push_back({ 0, (int32_t) params.n_sink });
    std::sort(spans.begin(), spans.end(), [](const laq_span & a, const laq_span & b) { return a.p0 < b.p0; });

    int64_t n   = 0;
    int32_t end = 0;
    for (const laq_span & s : spans) {
        n += std::max(0, s.p1 - std::max(s.p0, end));
        end = std::max(end, s.p1);
    }
    n += laq_policy_window(params) + laq_policy_ahead(params);
    return (uint32_t) std::min<int64_t>(n, std::numeric_limits<uint32_t>::max());
}
