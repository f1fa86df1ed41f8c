// Unit tests of native/src/laq-policy.h: no framework, the exit code is the number of failed checks (at most 100).
// What must equal the Python reference exactly is also fuzzed against it by tests/parity/test_selection.py.

#include "check.h"
#include "laq-policy.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

using indices = std::vector<uint32_t>;
using floats  = std::vector<float>;

// xorshift: the same numbers everywhere
struct rng_t {
    uint32_t state;

    uint32_t next() {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        return state;
    }

    uint32_t below(uint32_t n) { return next() % n; }
};

static laq_params make_params(laq_policy policy, uint32_t n_budget) {
    laq_params params      = {};
    params.size            = sizeof(params);
    params.policy          = policy;
    params.lookahead       = LAQ_LOOKAHEAD_DEFERRED;
    params.pooling         = LAQ_POOLING_MAX;
    params.n_kv_budget     = n_budget;
    params.n_lookahead     = 8;
    params.n_window        = 8;
    params.n_window_snapkv = 32;
    params.n_sink          = 4;
    params.n_kernel        = 7;
    return params;
}

static floats pool(const floats & src, uint32_t n_kernel, laq_pooling pooling) {
    floats dst(src.size(), -1.0f);
    laq_pool(src.data(), dst.data(), (uint32_t) src.size(), n_kernel, pooling);
    return dst;
}

static void test_pool() {
    const floats src = { 1, 5, 2, 0, 3, 4 };
    // width 3: each with its two neighbours, the ends with one
    CHECK((pool(src, 3, LAQ_POOLING_MAX) == floats{ 5, 5, 5, 3, 4, 4 }));
    // sums 6 8 7 5 7 7: zeros beyond the ends, always divided by 3
    CHECK((pool(src, 3, LAQ_POOLING_AVG) == floats{ 6 / 3.0f, 8 / 3.0f, 7 / 3.0f, 5 / 3.0f, 7 / 3.0f, 7 / 3.0f }));
    CHECK(pool(src, 7, LAQ_POOLING_NONE) == src);
    CHECK(pool(src, 1, LAQ_POOLING_MAX) == src);
    CHECK(pool(src, 1, LAQ_POOLING_AVG) == src);
    // wider than the row
    CHECK(pool(src, 31, LAQ_POOLING_MAX) == floats(6, 5.0f));
    CHECK(pool({ 2 }, 7, LAQ_POOLING_MAX) == floats{ 2 });
    CHECK(pool({ 7 }, 7, LAQ_POOLING_AVG) == floats{ 1 });
    CHECK(pool({}, 7, LAQ_POOLING_MAX).empty());
    // float32 from left to right: (1e8 + 1) - 1e8 is 0 and not 1
    CHECK(pool({ 1e8f, 1, -1e8f }, 3, LAQ_POOLING_AVG)[1] == 0.0f);
    // negative scores: nothing beyond the ends takes part in a maximum
    CHECK((pool({ -3, -2, -5 }, 3, LAQ_POOLING_MAX) == floats{ -2, -2, -2 }));
}

static void test_follow() {
    // positions with the gaps of an earlier eviction: only near ones follow
    const std::vector<int32_t> pos = { 0, 2, 3, 7, 8, 9 };
    const floats               src = { 0, 4, 1, 2, 0, 0 };

    const auto follow = [&](uint32_t n_follow) {
        floats dst(src.size(), -1.0f);
        laq_follow(src.data(), pos.data(), dst.data(), (uint32_t) src.size(), n_follow);
        return dst;
    };
    CHECK(follow(0) == src);
    CHECK((follow(1) == floats{ 0, 4, 4, 2, 2, 0 }));
    CHECK((follow(4) == floats{ 0, 4, 4, 2, 2, 2 }));
    CHECK((follow(5) == floats{ 0, 4, 4, 4, 2, 2 }));
    CHECK((follow(1u << 30) == floats{ 0, 4, 4, 4, 4, 4 }));
    laq_follow(nullptr, nullptr, nullptr, 0, 32);
}

static void test_copies() {
    // 100 keys of 1 and one of 7 or 8: 7 of 107 is less than 7 %, 8 of 108 is more
    floats               scores(101, 1.0f);
    std::vector<uint8_t> pinned(101, 0);

    const auto copies = [&]() { return laq_copies(scores.data(), pinned.data(), (uint32_t) scores.size()); };
    scores[40]        = 7.0f;
    CHECK(!copies());
    scores[40] = 8.0f;
    CHECK(copies());
    // what is pinned is neither the best key nor part of the sum
    pinned[40] = 1;
    CHECK(!copies());
    std::fill(scores.begin(), scores.end(), 0.0f);
    CHECK(!copies());
    CHECK(!laq_copies(nullptr, nullptr, 0));
    const float   inf[]  = { INFINITY, -INFINITY, 5.0f };
    const uint8_t none[] = { 0, 0, 0 };
    CHECK(!laq_copies(inf, none, 3));
}

static indices top(const floats & scores, const std::vector<uint8_t> & pinned, uint32_t n_budget) {
    return laq_top(scores.data(), pinned.data(), (uint32_t) scores.size(), n_budget);
}

static void test_top() {
    const float                inf    = std::numeric_limits<float>::infinity();
    const floats               scores = { 0.1f, 0.9f, 0.3f, 0.3f, 0.2f, 0.0f };
    const std::vector<uint8_t> none(6, 0);
    const std::vector<uint8_t> ends = { 1, 0, 0, 0, 0, 1 };
    // two pinned, then .9, then the lower one of the two .3
    CHECK((top(scores, ends, 4) == indices{ 0, 1, 2, 5 }));
    CHECK((top(scores, none, 4) == indices{ 1, 2, 3, 4 }));
    CHECK((top(scores, none, 2) == indices{ 1, 2 }));
    // more pinned than fit: the lowest of them
    CHECK((top(scores, ends, 1) == indices{ 0 }));
    CHECK(top(scores, ends, 0).empty());
    CHECK((top(scores, ends, 6) == indices{ 0, 1, 2, 3, 4, 5 }));
    CHECK((top(scores, ends, 100) == indices{ 0, 1, 2, 3, 4, 5 }));
    // all equal: the lowest
    CHECK((top(floats(6, 1.0f), none, 3) == indices{ 0, 1, 2 }));
    // both zeros are equal, infinities have a rank
    CHECK((top({ -0.0f, 0.0f, -0.0f }, { 0, 0, 0 }, 2) == indices{ 0, 1 }));
    CHECK((top({ -inf, 0.0f, -inf, inf }, { 0, 0, 0, 0 }, 3) == indices{ 0, 1, 3 }));
    // the score of a pinned key does not count
    CHECK((top({ 9, 8, -inf, 7 }, { 0, 0, 1, 0 }, 2) == indices{ 0, 2 }));
}

// the definition, one key at a time
static indices top_slow(const floats & scores, const std::vector<uint8_t> & pinned, uint32_t n_budget) {
    std::vector<bool> taken(scores.size(), false);
    for (uint32_t k = 0; k < n_budget && k < scores.size(); ++k) {
        int best = -1;
        for (int i = 0; i < (int) scores.size(); ++i) {
            if (taken[i]) {
                continue;
            }
            const bool better = best < 0 || pinned[i] > pinned[best] ||
                                (pinned[i] == pinned[best] && !pinned[i] && scores[i] > scores[best]);
            best              = better ? i : best;
        }
        taken[best] = true;
    }
    indices res;
    for (uint32_t i = 0; i < scores.size(); ++i) {
        if (taken[i]) {
            res.push_back(i);
        }
    }
    return res;
}

static void test_top_random() {
    rng_t rng = { 2463534242u };
    for (int round = 0; round < 2000; ++round) {
        const uint32_t       n        = 1 + rng.below(60);
        const uint32_t       n_values = 1 + rng.below(8);  // few values: many ties
        floats               scores(n);
        std::vector<uint8_t> pinned(n);
        for (uint32_t i = 0; i < n; ++i) {
            scores[i] = (float) rng.below(n_values);
            pinned[i] = rng.below(5) == 0;
        }
        const uint32_t n_budget = rng.below(n + 2);
        CHECK(top(scores, pinned, n_budget) == top_slow(scores, pinned, n_budget));
    }
}

static void test_random_score() {
    // the hash of state 0 is 0; seed 1 adds the golden gamma, so that the result is the first output of splitmix64
    // seeded with 0: 0xE220A8397B1DCDAF
    CHECK(laq_random_score(0, 0, 0, 0) == 0.0f);
    CHECK(laq_random_score(1, 0, 0, 0) == (float) 0xE220A8 / 16777216.0f);
    double sum = 0.0;
    for (int32_t pos = 0; pos < 4096; ++pos) {
        const float score = laq_random_score(0xFFFFFFFFu, 79, 127, pos);
        CHECK(score >= 0.0f && score < 1.0f);
        sum += score;
    }
    CHECK(std::fabs(sum / 4096 - 0.5) < 0.03);
    CHECK(laq_random_score(1, 2, 3, 4) != laq_random_score(2, 2, 3, 4));
    CHECK(laq_random_score(1, 2, 3, 4) != laq_random_score(1, 3, 3, 4));
    CHECK(laq_random_score(1, 2, 3, 4) != laq_random_score(1, 2, 4, 4));
    CHECK(laq_random_score(1, 2, 3, 4) != laq_random_score(1, 2, 3, 5));
}

static indices select_head(const laq_params & params, const laq_head_view & view) {
    return laq_select_keys(params, 0, 0, view, laq_pinned(params, view).data());
}

static void test_select_head() {
    // positions with the gaps of an earlier eviction; 1 sink, kept whole from 9 on
    const std::vector<int32_t> pos = { 0, 2, 3, 7, 8, 9 };
    // those of the sink and of the window do not count: they stay whatever they are
    const std::vector<uint8_t> pinned = { 1, 0, 0, 0, 0, 1 };
    const floats               scores = { 9, 4, 1, 2, 0, 8 };
    const laq_head_view        view   = { pos.data(), scores.data(), 6, 9 };
    const laq_head_view        blind  = { pos.data(), nullptr, 6, 9 };

    laq_params params = make_params(LAQ_POLICY_LAQ, 4);
    params.n_sink     = 1;
    params.n_kernel   = 3;
    // pooled 4 4 4 2 2 0: the sink, 9, then the two 4 at positions 2 and 3
    CHECK((laq_rank(params, 0, 0, view, pinned.data()) == floats{ 4, 4, 4, 2, 2, 0 }));
    CHECK((select_head(params, view) == indices{ 0, 1, 2, 5 }));
    // a span of the user, one past the end is free
    const laq_span span = { 7, 8 };
    params.pinned       = &span;
    params.n_pinned     = 1;
    CHECK((select_head(params, view) == indices{ 0, 1, 3, 5 }));
    params.n_pinned = 0;
    params.pooling  = LAQ_POOLING_NONE;
    CHECK((select_head(params, view) == indices{ 0, 1, 3, 5 }));
    // two cells for the best, at 2 and 7, one for 3, which follows 2; snapkv does not look ahead
    const floats        copied = { 9, 4, 1, 3, 2, 8 };
    const laq_head_view copy   = { pos.data(), copied.data(), 6, 9 };
    params.n_follow            = 1;
    params.n_kv_budget         = 5;
    CHECK((select_head(params, copy) == indices{ 0, 1, 2, 3, 5 }));
    params.policy          = LAQ_POLICY_SNAPKV;
    params.n_window_snapkv = 1;
    CHECK((select_head(params, copy) == indices{ 0, 1, 3, 4, 5 }));
    params.n_kv_budget = 4;

    params.policy = LAQ_POLICY_STREAMING;
    CHECK((select_head(params, blind) == indices{ 0, 3, 4, 5 }));
    // random ranks by layer and head, and is not pooled
    params.policy       = LAQ_POLICY_RANDOM;
    params.pooling      = LAQ_POOLING_MAX;
    params.seed         = 7;
    const floats ranked = laq_rank(params, 3, 1, blind, pinned.data());
    for (size_t i = 0; i < pos.size(); ++i) {
        CHECK(ranked[i] == laq_random_score(7, 3, 1, pos[i]));
    }
    // within the budget all stay
    params.n_kv_budget = 6;
    CHECK(select_head(params, blind).size() == 6);
}

static bool queries_are(laq_policy policy, int32_t n_prompt, int32_t first, int32_t last) {
    const laq_query_range range = laq_policy_queries(make_params(policy, 64), n_prompt, n_prompt + 20);
    return range.first == first && range.last == last;
}

static void test_queries() {
    CHECK(queries_are(LAQ_POLICY_LAQ, 100, 100, 108));
    CHECK(queries_are(LAQ_POLICY_LAQ_PP, 100, 92, 108));
    CHECK(queries_are(LAQ_POLICY_LAQ_PP, 5, 0, 13));
    CHECK(queries_are(LAQ_POLICY_SNAPKV, 100, 68, 100));
    CHECK(queries_are(LAQ_POLICY_SNAPKV, 10, 0, 10));
    // nothing, or less than the whole lookahead, has been decoded
    const laq_query_range none = laq_policy_queries(make_params(LAQ_POLICY_LAQ, 64), 100, 100);
    CHECK(none.first == 92 && none.last == 100);
    const laq_query_range some = laq_policy_queries(make_params(LAQ_POLICY_LAQ, 64), 100, 103);
    CHECK(some.first == 100 && some.last == 103);
    for (const laq_policy policy : { LAQ_POLICY_FULL, LAQ_POLICY_STREAMING, LAQ_POLICY_RANDOM }) {
        const laq_query_range range = laq_policy_queries(make_params(policy, 64), 100, 108);
        CHECK(range.first == range.last);
        CHECK(!laq_policy_needs_queries(make_params(policy, 64)));
        CHECK(!laq_policy_needs_lookahead(make_params(policy, 64)));
    }
    CHECK(laq_policy_needs_queries(make_params(LAQ_POLICY_SNAPKV, 64)));
    CHECK(!laq_policy_needs_lookahead(make_params(LAQ_POLICY_SNAPKV, 64)));
    CHECK(laq_policy_needs_lookahead(make_params(LAQ_POLICY_LAQ, 64)));
    CHECK(laq_policy_needs_lookahead(make_params(LAQ_POLICY_LAQ_PP, 64)));
    CHECK(laq_policy_window(make_params(LAQ_POLICY_SNAPKV, 64)) == 32);
    CHECK(laq_policy_window(make_params(LAQ_POLICY_LAQ_PP, 64)) == 8);
    CHECK(laq_policy_window(make_params(LAQ_POLICY_STREAMING, 64)) == 8);
}

static void test_n_pinned() {
    laq_params params = make_params(LAQ_POLICY_LAQ_PP, 64);
    CHECK(laq_policy_n_pinned(params) == 4 + 8 + 8);
    params.lookahead = LAQ_LOOKAHEAD_PSEUDO;  // the same when decoding fills the cells
    CHECK(laq_policy_n_pinned(params) == 4 + 8 + 8);
    CHECK(laq_policy_n_pinned(make_params(LAQ_POLICY_SNAPKV, 64)) == 4 + 32);
    CHECK(laq_policy_n_pinned(make_params(LAQ_POLICY_STREAMING, 64)) == 4 + 8);
    // 0..3 sinks, 2..9 overlaps them, 8..11 overlaps that, 20..21: the union is 0..11 and 20..21
    const laq_span spans[] = { { 20, 22 }, { 8, 12 }, { 2, 10 } };
    params.pinned          = spans;
    params.n_pinned        = 3;
    CHECK(laq_policy_n_pinned(params) == 14 + 8 + 8);
    // one span inside another
    const laq_span nested[] = { { 10, 30 }, { 12, 14 } };
    params.pinned           = nested;
    params.n_pinned         = 2;
    CHECK(laq_policy_n_pinned(params) == 4 + 20 + 8 + 8);
}

static bool plan_is(const laq_params & params, uint32_t n_cells, uint32_t n_resident, uint32_t n_left, laq_chunk want) {
    const laq_chunk got = laq_plan_chunk(&params, n_cells, n_resident, n_resident, n_left, 512);
    return got.n_tokens == want.n_tokens && got.n_evict == want.n_evict && got.n_probe == want.n_probe;
}

static void test_room() {
    laq_params params = make_params(LAQ_POLICY_LAQ_PP, 256);
    params.n_probe    = 48;
    CHECK(laq_policy_room(params) == 48 + 8);
    params.n_lookahead = 32;
    CHECK(laq_policy_ahead(params) == 32);
    CHECK(laq_policy_probe_ahead(params) == 8);
    CHECK(laq_policy_room(params) == 48 + 8);
    params.n_probe = 4;  // the lookahead from the end of the prompt takes more than the probe
    CHECK(laq_policy_room(params) == 32);
    params.n_lookahead = 3;
    CHECK(laq_policy_room(params) == 4 + 3);
    params.policy = LAQ_POLICY_SNAPKV;
    CHECK(laq_policy_room(params) == 0);
}

static void test_beside_ahead() {
    laq_params params = make_params(LAQ_POLICY_LAQ_PP, 256);
    CHECK(laq_policy_beside_ahead(params, 1024) == 1024 - params.n_lookahead);
    CHECK(laq_policy_beside_ahead(params, 512) == 512 - params.n_lookahead);
    CHECK(laq_policy_beside_ahead(params, 256) == 256);  // never less than what stays
    params.policy = LAQ_POLICY_SNAPKV;                   // looks at nothing ahead
    CHECK(laq_policy_beside_ahead(params, 512) == 512);
    params.n_kv_budget = UINT32_MAX;
    CHECK(laq_policy_beside_ahead(params, 1024) == UINT32_MAX);
}

static void test_plan_chunk() {
    laq_params params = make_params(LAQ_POLICY_LAQ_PP, 256);
    params.n_probe    = 48;
    // all of it fits 768 cells, with 8 for the lookahead
    CHECK(plan_is(params, 768, 0, 760, { 512, 0, 0 }));
    CHECK(plan_is(params, 768, 512, 248, { 248, 0, 0 }));
    // one token more does not, but nothing could be evicted
    CHECK(plan_is(params, 768, 100, 668, { 512, 0, 0 }));
    // 712 cells may be filled, 56 stay free for the probe
    CHECK(plan_is(params, 768, 0, 5000, { 512, 0, 0 }));
    CHECK(plan_is(params, 768, 512, 4488, { 456, 256, 48 }));
    // a smaller chunk keeps more: 128 of 200 free ones would leave 72 for the probe, 250 would not
    params.n_chunk = 128;
    CHECK(plan_is(params, 768, 568, 5000, { 128, 0, 0 }));
    CHECK(plan_is(params, 768, 600, 5000, { 128, 16, 48 }));
    // the probe is what is left of the prompt, or what is left of the cells
    CHECK(plan_is(params, 768, 740, 30, { 30, 58, 20 }));
    CHECK(plan_is(params, 768, 764, 30, { 0, 0, 0 }));
    // where nothing is said, a third of the cells less the probe's room
    params.n_chunk = 0;
    CHECK(laq_policy_chunk(params, 768) == (768 - 56) / 3);
    CHECK(laq_policy_chunk(params, 100) == 32 && laq_policy_chunk(params, 10) == 32);
    CHECK(laq_policy_chunk(make_params(LAQ_POLICY_STREAMING, 8), 300) == 100);
    // no lookahead, no probe
    CHECK(plan_is(make_params(LAQ_POLICY_STREAMING, 256), 768, 768, 5000, { 512, 512, 0 }));
    // never below the budget
    CHECK(plan_is(make_params(LAQ_POLICY_SNAPKV, 700), 768, 768, 5000, { 68, 68, 0 }));
    CHECK(plan_is(make_params(LAQ_POLICY_FULL, 256), 768, 768, 5000, { 0, 0, 0 }));
    CHECK(plan_is(make_params(LAQ_POLICY_FULL, 256), 768, 700, 5000, { 68, 0, 0 }));
}

static laq_chunk attending(const laq_params & params, uint32_t n_resident, uint32_t n_left, bool evicted) {
    return laq_plan_attending(params, { 768, n_resident, n_resident, n_left, 512, 128, evicted });
}

static void test_plan_attending() {
    laq_params params = make_params(LAQ_POLICY_LAQ_PP, 256);
    params.n_chunk    = 256;
    // before anything is evicted a batch is as large as it may be
    CHECK(attending(params, 0, 700, false).n_tokens == 512 && attending(params, 0, 700, false).n_evict == 0);
    // one eviction goes down to the budget, and then so many tokens attend at once
    CHECK(attending(params, 700, 2000, false).n_evict == 700 - 256);
    CHECK(attending(params, 700, 2000, false).n_tokens == 128);
    CHECK(attending(params, 300, 2000, true).n_tokens == 128 && attending(params, 300, 2000, true).n_evict == 0);
    // two halves at the end
    CHECK(attending(params, 300, 200, true).n_tokens == 100);
    CHECK(attending(params, 300, 128, true).n_tokens == 128);
    // the lookahead from the end finds cells
    CHECK(attending(params, 700, 60, true).n_tokens == 60);
    CHECK(attending(params, 701, 60, true).n_evict > 0);
}

int main() {
    test_plan_chunk();
    test_pool();
    test_follow();
    test_copies();
    test_top();
    test_top_random();
    test_random_score();
    test_select_head();
    test_queries();
    test_n_pinned();
    test_room();
    test_beside_ahead();
    test_plan_attending();
    if (n_failed > 0) {
        std::fprintf(stderr, "%d checks failed\n", n_failed);
    }
    return std::min(n_failed, 100);
}
