#include "laq-evict.h"

#include "laq-graph-fit.h"
#include "laq-graph-move.h"
#include "laq-threads.h"

#include "llama-impl.h"

#include <algorithm>

//
// archive
//

static void archive_rows(laq_context & laq, int32_t seq_id, const std::vector<int32_t> & pos,
                         const std::vector<uint32_t> & cells) {
    laq_archive &   archive = *laq.archive_of(seq_id);
    const auto      ends    = std::minmax_element(cells.begin(), cells.end());
    laq_host_buffer fetched;

    archive.open(pos);
    for (uint32_t ikv = 0; ikv < laq.store.layers.size(); ++ikv) {
        for (int part = 0; part < 2; ++part) {
            ggml_tensor *       t      = laq.store.part(ikv, part, seq_id);
            const int64_t       n      = laq.store.layers[ikv].n_embd_head(part);
            const uint32_t      n_head = laq.store.layers[ikv].n_head_kv;
            const laq_cell_rows rows(t, laq.store.lanes(ikv, part), *ends.first, *ends.second + 1, fetched);
            // each head by itself: memory that was allocated is touched here first, which takes longer than the copy
            laq_parallel(n_head, cells.size() * n, laq.n_threads(), [&](uint32_t h) {
                std::vector<uint8_t> turned(rows.row_size());
                for (size_t i = 0; i < cells.size(); ++i) {
                    laq_convert(t->type, rows.row(h, cells[i], turned.data()), (ggml_type) archive.type(part),
                                archive.row(pos[i], ikv, part, h), n);
                }
            });
            laq.stats.bytes_down += rows.n_transferred ? rows.n_transferred : n_head * cells.size() * rows.row_size();
        }
    }
    archive.close(pos);
}

void laq_archive_evicted(laq_context & laq, const laq_plan & plan, const std::vector<uint32_t> & order) {
    constexpr size_t N_STEP = 1024;  // tokens that are in host memory at least, whatever the limit

    if (!laq.archive_of(plan.seq_id)) {
        return;
    }
    const laq_archive & archive = *laq.archive_of(plan.seq_id);
    const int32_t       begin   = laq.seqs[plan.seq_id].n_intact;
    const int32_t       end     = std::min(plan.n_intact, plan.n_end);
    try {
        for (size_t i = 0; i < order.size();) {
            std::vector<int32_t>  pos;
            std::vector<uint32_t> cells;
            for (; i < order.size() && pos.size() < N_STEP; ++i) {
                const int32_t p = laq.store.cells(plan.seq_id).pos_get(order[i]);
                if (p >= begin && p < end && !archive.has(p)) {
                    pos.push_back(p);
                    cells.push_back(order[i]);
                }
            }
            if (!pos.empty()) {
                archive_rows(laq, plan.seq_id, pos, cells);
            }
        }
    } catch (const std::bad_alloc &) {
        throw laq_error(LAQ_STATUS_NO_MEMORY, "no host memory for the archive: set kv_recall_limit");
    }
}

//
// score
//

// positions of the first n cells, as far as they are of a sequence
static std::vector<int32_t> positions_of(const laq_context & laq, int32_t seq_id, int64_t n) {
    const llama_kv_cells & table = laq.store.cells(seq_id);
    std::vector<int32_t>   pos(n, INT32_MAX);
    for (int64_t i = 0; i < n; ++i) {
        if (!table.is_empty(i) && table.seq_has(i, seq_id)) {
            pos[i] = table.pos_get(i);
        }
    }
    return pos;
}

// the attention of the observed queries, a column for each cell; empty if no query was captured
static laq_scores score(laq_context & laq, const laq_plan & plan, const std::vector<laq_observed> & observed) {
    laq_scores res;
    if (observed.empty()) {
        return res;
    }
    laq_compute & compute = laq.compute;
    compute.begin();
    laq_score_nodes nodes(compute.ctx(), laq.store.cells(plan.seq_id).used_max_p1(), observed.size());
    laq_graph_score_cells(compute, nodes, laq.store, plan.seq_id);
    compute.alloc("the score graph: use a smaller window_size");
    laq_set_observed(nodes.slots, nodes.mask, observed, positions_of(laq, plan.seq_id, nodes.mask->ne[0]));
    compute.run(laq.n_threads(), "the score graph failed");
    res.n         = nodes.mask->ne[0];
    res.n_queries = observed.size();
    res.rows.resize(res.n * laq.store.n_heads);
    for (uint32_t ikv = 0; ikv < laq.store.layers.size(); ++ikv) {
        ggml_tensor * t = nodes.scores[ikv];  // [n, n_head_kv]
        ggml_backend_tensor_get(t, res.rows.data() + laq.store.layers[ikv].first_head * res.n, 0, ggml_nbytes(t));
    }
    return res;
}

// The mean over the queries. Where a probe has looked before, the mean of that and what it saw: the prompt asks for the
// same each time, and one look alone loses by chance what the next one would have kept.
static laq_scores joined(const laq_context & laq, int32_t seq_id, const std::vector<uint32_t> & order,
                         const laq_scores & scores) {
    const laq_seq & seq = laq.seqs[seq_id];
    laq_scores      res = scores;
    for (uint32_t head = 0; head < laq.store.n_heads && res.n > 0; ++head) {
        const float * memory = laq.store.memory(head, seq_id);
        float *       row    = res.rows.data() + head * res.n;
        for (const uint32_t cell : order) {
            row[cell] /= (float) res.n_queries;
            if (seq.phase.probed() && laq.store.cells(seq_id).pos_get(cell) < seq.n_intact) {
                row[cell] = (row[cell] + memory[cell]) * 0.5f;
            }
        }
    }
    return res;
}

void laq_keep_scores(laq_context & laq, const laq_scores & scores, const std::vector<uint32_t> & tokens) {
    if (!laq.facts.debug) {
        return;
    }
    laq_scores & kept = laq.scores[laq.stats.n_evictions % laq_context::N_DEBUG];
    kept              = { {}, scores.n ? tokens.size() : 0, scores.n_queries };
    for (uint32_t head = 0; head < laq.store.n_heads && kept.n > 0; ++head) {
        for (const uint32_t token : tokens) {
            kept.rows.push_back(scores.rows[head * scores.n + token]);
        }
    }
}

// what the chosen tokens scored, for the next probe
static void memorize(laq_context & laq, int32_t seq_id, const laq_choice & choice, const laq_scores & scores,
                     const std::vector<uint32_t> & dst) {
    for (size_t i = 0; i < choice.cell.size(); ++i) {
        const uint32_t head = i / choice.n;
        laq.store.memory(head, seq_id)[dst[i % choice.n]] =
            scores.n > 0 ? scores.rows[head * scores.n + choice.cell[i]] : 0.0f;
    }
}

//
// move
//

static void move_by_graph(laq_context & laq, const laq_moves & moves) {
    const int64_t n      = moves.dst.back() + 1;
    const int64_t n_from = std::max<int64_t>(n, laq.store.cells(moves.seq_id).used_max_p1());
    laq.compute.begin();
    const std::vector<ggml_tensor *> index = laq_graph_moves(laq.compute, laq.store, moves.seq_id, n, n_from);
    laq.compute.alloc("the graph that moves K and V");
    for (uint32_t ikv = 0; ikv < index.size(); ++ikv) {
        const std::vector<int32_t> cells = laq_move_index(laq.store, moves, ikv, n);
        ggml_backend_tensor_set(index[ikv], cells.data(), 0, ggml_nbytes(index[ikv]));
    }
    try {
        laq.compute.run(laq.n_threads(), "K and V could not be moved: the sequence is removed");
    } catch (...) {
        laq.store.kv.seq_rm(moves.seq_id, -1, -1);
        throw;
    }
}

std::vector<uint32_t> laq_settle(laq_context & laq, const laq_plan & plan, const std::vector<uint32_t> & order,
                                 const std::vector<uint8_t> & own, const laq_choice & choice) {
    laq_commit done  = laq.store.prepare(plan.seq_id, order, own, choice, plan.n_intact, laq.params.n_sink);
    laq_moves  moves = { plan.seq_id, done.dst, std::vector<uint32_t>(choice.cell.size()) };
    for (size_t i = 0; i < moves.src.size(); ++i) {
        moves.src[i] = choice.cell[i] < 0 ? done.dst[i % choice.n] : (uint32_t) choice.cell[i];
    }
    if (laq.facts.by_graph && choice.n > 0) {
        move_by_graph(laq, moves);
    } else {
        laq_move_room room = laq_room_to_move(laq.store, moves);
        laq_move_by_host(laq.store, moves, room);
    }
    laq.store.commit(plan.seq_id, laq.seqs[plan.seq_id], order, own, choice, done);
    return std::move(moves.dst);
}

//
// fit
//

std::vector<laq_observed> laq_fitted_to(std::vector<laq_observed> observed, bool of_all) {
    const auto out_of_date = [of_all](const laq_observed & o) {
        return o.output == laq_output::NONE || (of_all && o.output != laq_output::ALL);
    };
    observed.erase(std::remove_if(observed.begin(), observed.end(), out_of_date), observed.end());
    // what a fit costs grows with the square of their number
    observed.erase(observed.begin(), observed.end() - std::min<size_t>(observed.size(), LAQ_FIT_QUERIES));
    return observed;
}

// [n_head_kv][n], 1 = V of a head may change: what is pinned keeps its V
static std::vector<float> free_of_layer(const laq_context & laq, const laq_plan & plan, uint32_t ikv,
                                        const std::vector<uint32_t> & dst, int64_t n) {
    const laq_params     p = laq.params_of(plan.seq_id);
    std::vector<float>   res(laq.store.layers[ikv].n_head_kv * n);
    std::vector<int32_t> pos(dst.size());
    for (uint32_t h = 0; h < laq.store.layers[ikv].n_head_kv; ++h) {
        for (size_t i = 0; i < dst.size(); ++i) {
            pos[i] = laq.store.pos_at(laq.seqs[plan.seq_id], plan.seq_id, laq.store.layers[ikv].first_head + h, dst[i]);
        }
        const std::vector<uint8_t> pinned =
            laq_pinned(p, { pos.data(), nullptr, (uint32_t) pos.size(), plan.n_intact });
        for (size_t i = 0; i < dst.size(); ++i) {
            res[h * n + i] = pinned[i] ? 0.0f : 1.0f;
        }
    }
    return res;
}

static void fit(laq_context & laq, const laq_plan & plan, const std::vector<laq_observed> & observed,
                const std::vector<uint32_t> & dst) {
    laq_compute & compute = laq.compute;
    compute.begin();
    const laq_fit_nodes nodes = laq_graph_fit(compute, laq.store, plan.seq_id, dst.size(), dst.back() + 1,
                                              observed.size(), &laq.params.value_fit);
    compute.alloc("the fit of values");

    const int64_t         n = nodes.cells->ne[0];
    std::vector<uint32_t> cells(dst);
    std::vector<int32_t>  pos(n, INT32_MAX);
    for (size_t i = 0; i < dst.size(); ++i) {
        pos[i] = laq.store.cells(plan.seq_id).pos_get(dst[i]);
    }
    cells.resize(n, dst.back());
    ggml_backend_tensor_set(nodes.cells, cells.data(), 0, ggml_nbytes(nodes.cells));
    laq_set_observed(nodes.slots, nodes.mask, observed, pos);
    for (uint32_t ikv = 0; ikv < nodes.free.size(); ++ikv) {
        const std::vector<float> free = free_of_layer(laq, plan, ikv, dst, n);
        ggml_backend_tensor_set(nodes.free[ikv], free.data(), 0, ggml_nbytes(nodes.free[ikv]));
    }
    compute.run(laq.n_threads(), "not all values are fitted");
}

void laq_fit(laq_context & laq, const laq_plan & plan, const std::vector<laq_observed> & observed,
             const std::vector<uint32_t> & dst) {
    if (observed.empty() || dst.empty()) {
        return;
    }
    const int64_t t0 = ggml_time_us();
    try {
        fit(laq, plan, observed, dst);
    } catch (const std::exception & e) {
        LLAMA_LOG_WARN("%s: %s\n", __func__, e.what());
    }
    laq.stats.ms_fit += (ggml_time_us() - t0) / 1000.0;
}

//
// an eviction
//

void laq_evict(laq_context & laq, const laq_plan & plan, const std::vector<uint32_t> & order) {
    const std::vector<uint8_t> own = laq.store.owned(plan.seq_id, order);
    laq_seq &                  seq = laq.seqs[plan.seq_id];
    const int64_t              t0  = ggml_time_us();

    std::vector<laq_observed> observed;
    laq_scores                scores;
    if (laq_policy_needs_queries(laq.params)) {
        observed = laq.observed(plan.seq_id, plan.queries, plan.by_probe);
        scores   = score(laq, plan, observed);
    }
    const bool       joins = laq_policy_needs_lookahead(laq.params) && (plan.by_probe || seq.phase.probed());
    const laq_scores rank  = joins ? joined(laq, plan.seq_id, order, scores) : laq_scores();
    const int64_t    t1    = ggml_time_us();

    const laq_scores & by     = joins ? rank : scores;
    laq_choice         choice = laq_choose_resident(laq, plan, order, own, by);
    const int64_t      t2     = ggml_time_us();

    const bool is_whole = std::find(own.begin(), own.end(), 0) == own.end();
    const bool fits =
        laq_policy_fits(laq.params) && !plan.by_probe && plan.n_keep <= laq.params.n_kv_budget && is_whole;
    observed = laq_fitted_to(fits ? observed : std::vector<laq_observed>(), false);
    if (!observed.empty()) {
        // what was decoded ahead goes after the fit: the queries see it
        laq_choose_ahead(laq, plan, order, choice);
    }
    laq_keep_scores(laq, scores, order);
    const std::vector<uint32_t> dst = laq_settle(laq, plan, order, own, choice);
    // nothing fails from here on
    if (plan.by_probe) {
        memorize(laq, plan.seq_id, choice, by, dst);
    }
    seq.evicted(plan.n_intact, plan.n_end, plan.by_probe, laq.archive_of(plan.seq_id) != nullptr);
    seq.fitted |= !observed.empty();
    const int64_t t3 = ggml_time_us();
    laq_fit(laq, plan, observed, dst);

    laq.stats.ms_score += (t1 - t0) / 1000.0;
    laq.stats.ms_select += (t2 - t1) / 1000.0;
    laq.stats.ms_compact += (t3 - t2) / 1000.0;
    ++laq.stats.n_evictions;
}
