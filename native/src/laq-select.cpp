#include "laq-select.h"

#include "laq-threads.h"

#include "llama-impl.h"

#include <algorithm>

static void check_pinned(const laq_params & params, uint32_t n_shared, uint32_t n_pinned) {
    laq_check(n_pinned + n_shared <= params.n_kv_budget,
              std::to_string(n_pinned + n_shared) + " tokens of the sequence are pinned or shared with " +
                  "another one (llama_memory_seq_cp), kv_budget = " + std::to_string(params.n_kv_budget) +
                  ": raise kv_budget or pin and share less");
}

std::vector<uint32_t> laq_keep_of_head(const laq_params & params, uint32_t ikv, uint32_t h, const laq_head_view & view,
                                       uint32_t n_shared) {
    const std::vector<uint8_t> pinned = laq_pinned(params, view);
    check_pinned(params, n_shared, std::count(pinned.begin(), pinned.end(), 1));

    laq_params p = params;
    p.n_kv_budget -= n_shared;
    return laq_select_keys(p, ikv, h, view, pinned.data());
}

uint32_t laq_n_before_end(const laq_context & laq, const laq_plan & plan, const std::vector<uint32_t> & order) {
    const llama_kv_cells & table = laq.store.cells(plan.seq_id);
    return std::count_if(order.begin(), order.end(), [&](uint32_t cell) { return table.pos_get(cell) < plan.n_end; });
}

// the parameters of one choice; where no query observes, the newest tokens stay
static laq_params params_of_plan(const laq_context & laq, const laq_plan & plan, bool scored) {
    laq_params p  = laq.params_of(plan.seq_id);
    p.n_kv_budget = plan.n_keep;
    if (!scored && laq_policy_needs_queries(p)) {
        if (plan.queries.first < plan.queries.last) {
            LLAMA_LOG_WARN(
                "%s: the queries of the last tokens were removed with their tokens: the newest tokens stay\n",
                __func__);
        }
        p.policy = LAQ_POLICY_STREAMING;
    }
    return p;
}

std::vector<laq_held> laq_held_by(const laq_context & laq, int32_t seq_id, uint32_t head,
                                  const std::vector<uint32_t> & cells) {
    std::vector<laq_held> res;
    res.reserve(cells.size());
    for (const uint32_t cell : cells) {
        res.push_back({ laq.store.pos_at(laq.seqs[seq_id], seq_id, head, cell), (int32_t) cell });
    }
    const auto before = [](const laq_held & a, const laq_held & b) { return a.pos < b.pos; };
    if (!std::is_sorted(res.begin(), res.end(), before)) {
        std::sort(res.begin(), res.end(), before);  // cells that were shared stand where their tokens are
    }
    return res;
}

// what one head keeps of the candidates, which are cells
struct head_choice {
    const laq_context &           laq;
    const laq_plan &              plan;
    const laq_params &            params;
    const std::vector<uint32_t> & candidates;
    const laq_scores &            scores;
    uint32_t                      n_shared;

    // into rows of the choice
    void make(uint32_t ikv, uint32_t h, laq_choice & choice) const {
        const size_t          head = laq.store.layers[ikv].first_head + h;
        std::vector<laq_held> held = laq_held_by(laq, plan.seq_id, head, candidates);
        std::vector<int32_t>  pos(held.size());
        std::vector<float>    s(scores.n == 0 ? 0 : held.size());
        for (uint32_t i = 0; i < held.size(); ++i) {
            pos[i] = held[i].pos;
        }
        for (uint32_t i = 0; i < s.size(); ++i) {
            s[i] = scores.rows[head * scores.n + held[i].cell];
        }
        const laq_head_view view = { pos.data(), s.empty() ? nullptr : s.data(), (uint32_t) pos.size(), plan.n_intact };
        const std::vector<uint32_t> kept = laq_keep_of_head(params, ikv, h, view, n_shared);
        for (uint32_t i = 0; i < choice.n; ++i) {
            choice.pos[head * choice.n + i]  = held[kept[i]].pos;
            choice.cell[head * choice.n + i] = held[kept[i]].cell;
        }
    }
};

laq_choice laq_choose_resident(const laq_context & laq, const laq_plan & plan, const std::vector<uint32_t> & order,
                               const std::vector<uint8_t> & own, const laq_scores & scores) {
    const laq_params      params   = params_of_plan(laq, plan, scores.n > 0);
    const uint32_t        n_shared = std::count(own.begin(), own.end(), 0);
    std::vector<uint32_t> candidates;
    for (uint32_t i = 0; i < order.size(); ++i) {
        if (own[i] && laq.store.cells(plan.seq_id).pos_get(order[i]) < plan.n_end) {
            candidates.push_back(order[i]);
        }
    }
    check_pinned(params, n_shared, 0);

    laq_choice res;
    res.n = std::min<uint32_t>(candidates.size(), params.n_kv_budget - n_shared);
    res.pos.resize((size_t) res.n * laq.store.n_heads);
    res.cell.resize(res.pos.size());

    const head_choice head = { laq, plan, params, candidates, scores, n_shared };
    laq_parallel(laq.store.layers.size(), laq.store.n_head_kv_max() * candidates.size(), laq.n_threads(),
                 [&](uint32_t ikv) {
                     for (uint32_t h = 0; h < laq.store.layers[ikv].n_head_kv; ++h) {
                         head.make(ikv, h, res);
                     }
                 });
    return res;
}

void laq_choose_ahead(const laq_context & laq, const laq_plan & plan, const std::vector<uint32_t> & order,
                      laq_choice & choice) {
    std::vector<int32_t>       pos;
    const std::vector<int32_t> cell(order.begin() + laq_n_before_end(laq, plan, order), order.end());
    for (const int32_t c : cell) {
        pos.push_back(laq.store.cells(plan.seq_id).pos_get(c));
    }
    laq_choice res;
    res.n = choice.n + pos.size();
    for (uint32_t head = 0; head < laq.store.n_heads; ++head) {
        const size_t at = (size_t) head * choice.n;
        res.pos.insert(res.pos.end(), choice.pos.begin() + at, choice.pos.begin() + at + choice.n);
        res.pos.insert(res.pos.end(), pos.begin(), pos.end());
        res.cell.insert(res.cell.end(), choice.cell.begin() + at, choice.cell.begin() + at + choice.n);
        res.cell.insert(res.cell.end(), cell.begin(), cell.end());
    }
    choice = std::move(res);
}
