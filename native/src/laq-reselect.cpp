// The choice from archived and resident tokens together, and what comes back to the cells.

#include "laq-reselect.h"

#include "laq-recall.h"
#include "laq-threads.h"

#include "ggml-backend.h"
#include "llama-impl.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <set>

uint32_t laq_reselection::n_ahead() const {
    return std::count_if(order.begin(), order.end(),
                         [&](uint32_t cell) { return laq.cells().pos_get(cell) >= e.n_end; });
}

// Tokens that every head can hold, at most what the eviction asks for. Where all tokens are kept, there is nothing to fit.
uint32_t laq_reselection::n_kept() {
    const uint32_t n_own = order.size() - n_ahead();

    uint32_t n_least = UINT32_MAX;
    uint32_t n_most  = 0;
    for (uint32_t ikv = 0; ikv < laq.layers.size(); ++ikv) {
        for (uint32_t h = 0; h < laq.layers[ikv].n_head_kv; ++h) {
            const uint32_t n_both = laq_n_archived(laq, e.seq_id, ikv, h, order);
            n_least               = std::min<uint32_t>(n_least, archived.size() + n_own - n_both);
            n_most                = std::max<uint32_t>(n_most, archived.size() + n_own - n_both);
        }
    }
    const uint32_t n_room = laq.n_cells() - laq.n_used() + order.size() - (fits ? n_ahead() : 0);
    const uint32_t n      = std::min({ e.n_keep, n_least, n_room });
    fitted                = fits && n < n_most ? laq_last_fitted(obs, e.n_fit) : std::vector<laq_observation>();
    weighs                = !laq_all_exact(fitted);
    return n;
}

bool laq_reselection::comes_back(int part, const laq_row & row) const {
    return row.cell < 0 || (part == 1 && laq.seqs[e.seq_id].fitted && laq.recall->archive.has(row.pos));
}

// what a head may choose from, and pseudo tokens: in order of position
std::vector<laq_row> laq_reselection::candidates_of(uint32_t ikv, uint32_t h) const {
    std::vector<laq_row> res;
    res.reserve(archived.size() + order.size());
    auto next = archived.begin();
    for (const uint32_t cell : order) {
        const int32_t pos = laq.pos_at(e.seq_id, ikv, h, cell);
        for (; next != archived.end() && *next < pos; ++next) {
            res.push_back({ *next, -1 });
        }
        next += next != archived.end() && *next == pos;
        res.push_back({ pos, (int32_t) cell });
    }
    for (; next != archived.end(); ++next) {
        res.push_back({ *next, -1 });
    }
    return res;
}

laq_candidate_rows::laq_candidate_rows(const laq_reselection & s, uint32_t ikv, int part,
                                       const laq_archive_part & archived, laq_host_buffer & fetched) :
    s(s), archived(archived), cells(s.laq, ikv, part == 1, 0, s.laq.cells().used_max_p1(), fetched), part(part),
    n(laq_n_embd_of(s.laq, ikv, part)), type_cells(laq_part_of(s.laq, ikv, part)->type),
    type_archive(s.laq.recall->type[part]), to(s.laq.recall->row_type(s.laq, part)),
    n_archived(ggml_row_size(type_archive, n)), n_row(ggml_row_size(to, n)) {}

void laq_candidate_rows::gather(const laq_row * first, const laq_row * last, uint32_t h, uint8_t * dst) const {
    std::vector<uint8_t> turned(cells.row_size());
    for (const laq_row *row = first, *end; row < last; dst += (end - row) * n_row, row = end) {
        end = row + 1;
        if (!s.comes_back(part, *row)) {
            laq_convert(type_cells, cells.row(h, row->cell, turned.data()), to, dst, n);
            continue;
        }
        // what follows it in its block lies behind it
        while (end < last && s.comes_back(part, *end) && end->pos == end[-1].pos + 1 &&
               end->pos % laq_archive::N_BLOCK != 0) {
            ++end;
        }
        laq_convert(type_archive, archived.row(h, row->pos, n_archived), to, dst, n * (end - row));
    }
}

bool laq_reselection::is_masked(const std::vector<laq_row> & of_head) const {
    const auto same = [](int32_t p, const laq_row & row) { return p == row.pos; };
    return masked.size() == of_head.size() && std::equal(masked.begin(), masked.end(), of_head.begin(), same);
}

// a query sees up to its own position; archived tokens are before all queries
void laq_reselection::set_mask(const std::vector<laq_row> & of_head) {
    const size_t n = of_head.size();

    mask_id = laq.recall->scorer.next_mask();
    masked.clear();
    for (const laq_row & row : of_head) {
        masked.push_back(row.pos);
    }
    mask.assign(obs.size() * n, 0.0f);
    for (size_t j = 0; j < obs.size(); ++j) {
        const auto end = std::upper_bound(masked.begin(), masked.end(), obs[j].pos);
        std::fill(mask.begin() + j * n + (end - masked.begin()), mask.begin() + (j + 1) * n, -INFINITY);
    }
}

laq_head_op laq_reselection::op_of(const std::vector<laq_row> & of_head, uint32_t ikv, uint32_t h,
                                   const laq_layer_queries & by) const {
    const laq_layer & layer   = laq.layers[ikv];
    const int64_t     n_group = layer.n_head / layer.n_head_kv;

    laq_head_op op;
    op.type        = laq.recall->row_type(laq, 0);
    op.n_embd_head = layer.n_embd_head_k;
    op.n_group     = n_group;
    op.n_q         = by.n_q;
    op.n_kv        = of_head.size();
    op.q           = by.queries.data() + h * n_group * op.n_q * op.n_embd_head;
    op.mask        = mask.data() + (obs.size() - by.n_q) * of_head.size();
    op.mask_id     = mask_id;
    op.sinks       = by.sinks.empty() ? nullptr : by.sinks.data() + h * n_group;
    op.scale       = layer.kq_scale;
    op.softcap     = layer.softcap;
    return op;
}

// As laq_cache::remember(). What had left the cells when a probe looked counts as nothing then.
std::vector<float> laq_reselection::remembered(const std::vector<laq_row> & of_head, uint32_t ikv, uint32_t h) const {
    const std::vector<float> & s      = scores[ikv][h];
    const float *              memory = laq.layers[ikv].memory.data() + (size_t) h * laq.n_cells();
    std::vector<float>         res(of_head.size());
    for (size_t i = 0; i < res.size(); ++i) {
        res[i] = s[i] / (float) obs.size();
        if (of_head[i].pos < laq.seqs[e.seq_id].n_intact) {
            res[i] = laq_joined(res[i], of_head[i].cell < 0 ? 0.0f : memory[of_head[i].cell]);
        }
    }
    return res;
}

// what a head gets; in the first layers, where that decides, how much of it is there
laq_overlap laq_reselection::choose(uint32_t ikv, uint32_t h, const std::vector<laq_row> & of_head) {
    std::vector<float> joined;
    if (laq.seqs[e.seq_id].remembers && laq_policy_needs_lookahead(params)) {
        joined = remembered(of_head, ikv, h);
    }
    const std::vector<float> & s = joined.empty() ? scores[ikv][h] : joined;
    std::vector<int32_t>       pos;
    pos.reserve(of_head.size());
    for (const laq_row & row : of_head) {
        if (row.pos < e.n_end) {
            pos.push_back(row.pos);
        }
    }
    const laq_head_view   view = { pos.data(), s.data(), (uint32_t) pos.size(), e.n_intact };
    std::vector<uint32_t> kept = laq_keep_of_head(params, ikv, h, view, 0);
    rows[ikv][h].reserve(kept.size());
    for (const uint32_t i : kept) {
        rows[ikv][h].push_back(of_head[i]);
    }
    if (e.always || ikv >= LAQ_RECALL_LAYERS) {
        return {};
    }
    if (params.n_kv_budget > laq.params.n_kv_budget) {
        laq_params p  = params;
        p.n_kv_budget = laq.params.n_kv_budget;
        kept          = laq_keep_of_head(p, ikv, h, view, 0);
    }
    const size_t n_same = std::count_if(kept.begin(), kept.end(), [&](uint32_t i) { return of_head[i].cell >= 0; });
    return { n_same, kept.size() };
}

// 1 = of the archive's blocks, one that V of a selected row is read from
std::vector<uint8_t> laq_reselection::blocks_of_values(uint32_t ikv) const {
    std::vector<uint8_t> wanted(blocks.size());
    for (const std::vector<laq_row> & of_head : rows[ikv]) {
        for (const laq_row & row : of_head) {
            if (comes_back(1, row)) {
                wanted[row.pos / laq_archive::N_BLOCK] = 1;
            }
        }
    }
    return wanted;
}

// false: a block was lost
bool laq_reselection::fetch(uint32_t ikv, laq_archived_layer & archive) {
    if (!weighs && !archive[1].read(laq.recall->archive, ikv, 1, blocks_of_values(ikv))) {
        return false;
    }
    for (int part = 0; part < 2; ++part) {
        const laq_archive_part & from  = archive[part];
        const ggml_type          type  = laq_part_of(laq, ikv, part)->type;
        const ggml_type          there = laq.recall->type[part];
        const int64_t            n     = laq_n_embd_of(laq, ikv, part);
        const size_t             n_row = ggml_row_size(type, n);

        std::vector<std::vector<uint8_t>> & bytes = recalled[ikv].bytes[part];
        bytes.resize(rows[ikv].size());
        const auto is_back = [&](const laq_row & row) { return comes_back(part, row); };
        laq_parallel(bytes.size(), rows[ikv][0].size() * n, laq.n_threads(), [&](uint32_t h) {
            const std::vector<laq_row> & of_head = rows[ikv][h];
            bytes[h].resize(std::count_if(of_head.begin(), of_head.end(), is_back) * n_row);
            uint8_t * dst = bytes[h].data();
            for (const laq_row & row : of_head) {
                if (is_back(row)) {
                    laq_convert(there, from.row(h, row.pos, ggml_row_size(there, n)), type, dst, n);
                    dst += n_row;
                }
            }
        });
    }
    return true;
}

laq_layer_queries::laq_layer_queries(const laq_cache & laq, uint32_t ikv, const std::vector<laq_observation> & obs) :
    n_q(obs.size()), queries(obs.size() * laq.layers[ikv].n_ring_q()),
    sinks(laq.layers[ikv].sinks ? laq.layers[ikv].n_head : 0) {
    const laq_layer & layer   = laq.layers[ikv];
    const size_t      d       = layer.n_embd_head_k;
    const auto        by_slot = [](const laq_observation & a, const laq_observation & b) { return a.slot < b.slot; };
    const auto [first, last]  = std::minmax_element(obs.begin(), obs.end(), by_slot);

    const std::vector<float> all = laq.queries(ikv, first->slot, last->slot - first->slot + 1);
    for (size_t j = 0; j < obs.size(); ++j) {
        const float * row = all.data() + (obs[j].slot - first->slot) * layer.n_ring_q();
        for (uint32_t h = 0; h < layer.n_head; ++h) {
            std::copy_n(row + h * d, d, queries.data() + (h * obs.size() + j) * d);
        }
    }
    if (layer.sinks) {
        ggml_backend_tensor_get(layer.sinks, sinks.data(), 0, sinks.size() * sizeof(float));
    }
}

// one head at a time: its keys are brought together, which are many
void laq_reselection::score(uint32_t ikv, const laq_rows_of_layer & of_heads, const laq_archived_layer & archive) {
    laq_recall_scorer &              scorer = laq.recall->scorer;
    const laq_candidate_rows         keys(*this, ikv, 0, archive[0], laq.recall->fetched);
    const laq_layer_queries          by(laq, ikv, obs);
    std::optional<laq_layer_outputs> outs;
    if (weighs) {
        outs.emplace(*this, ikv, archive[1]);
    }
    const struct waits {
        laq_recall_scorer & scorer;
        ~waits() { scorer.abandon(); }
    } to_the_end{ scorer };  // what is scored beside this reads from here
    scores[ikv].resize(of_heads.size());
    for (uint32_t h = 0; h < of_heads.size(); ++h) {
        const std::vector<laq_row> & of_head = of_heads[h];
        if (!is_masked(of_head)) {
            scorer.wait();
            set_mask(of_head);
        }
        laq_head_op     op       = op_of(of_head, ikv, h, by);
        uint8_t * const gathered = scorer.keys(ikv, of_head.size() * keys.row_size());

        op.k    = gathered;
        op.fill = [&](int64_t i0, int64_t i1) {
            keys.gather(of_head.data() + i0, of_head.data() + i1, h, gathered + i0 * keys.row_size());
            if (outs) {
                outs->gather(of_head, h, i0, i1);
            }
        };
        scores[ikv][h].resize(of_head.size());
        if (outs) {
            outs->ask(op);
        }
        scorer.start(ikv, op, scores[ikv][h].data());
        if (outs) {
            outs->take(op, h);
        }
    }
    scorer.wait();
    if (outs) {
        outs->keep();
    }
}

bool laq_reselection::begin_layer(uint32_t ikv, laq_archived_layer & archive, laq_rows_of_layer & of_heads) const {
    of_heads.resize(laq.layers[ikv].n_head_kv);
    laq_parallel(of_heads.size(), n_candidates(), laq.n_threads(),
                 [&](uint32_t h) { of_heads[h] = candidates_of(ikv, h); });
    return archive[0].read(laq.recall->archive, ikv, 0, blocks) &&
           (!weighs || archive[1].read(laq.recall->archive, ikv, 1, blocks));
}

laq_reselection::result laq_reselection::run_layer(uint32_t ikv) {
    laq_archived_layer archive;
    laq_rows_of_layer  of_heads;
    if (!begin_layer(ikv, archive, of_heads)) {
        return result::LOST;
    }
    const uint32_t n = of_heads.size();
    score(ikv, of_heads, archive);
    rows[ikv].resize(n);
    std::vector<laq_overlap> found(n);
    laq_parallel(n, n_candidates(), laq.n_threads(), [&](uint32_t h) { found[h] = choose(ikv, h, of_heads[h]); });
    for (const laq_overlap & f : found) {
        old.n_same += f.n_same;
        old.n_all += f.n_all;
    }
    if (laq.debug) {
        candidates[ikv] = std::move(of_heads);
    }
    if (!e.always && ikv + 1 == std::min<uint32_t>(LAQ_RECALL_LAYERS, laq.layers.size()) &&
        old.n_all - old.n_same < LAQ_RECALL_NEW * old.n_all) {
        return result::SAME;
    }
    return fetch(ikv, archive) ? result::DONE : result::LOST;
}

void laq_reselection::begin() {
    archived = laq.recall->archive.positions();
    scores.assign(laq.layers.size(), {});
    blocks.assign(laq.recall->archive.n_blocks(), 0);
    for (const int32_t pos : archived) {
        blocks[pos / laq_archive::N_BLOCK] = 1;
    }
    masked.clear();
}

laq_rows laq_reselection::with_ahead() const {
    laq_rows res = rows;
    for (const uint32_t cell : order) {
        const int32_t pos = laq.cells().pos_get(cell);
        for (size_t ikv = 0; ikv < res.size() && pos >= e.n_end && !fitted.empty(); ++ikv) {
            for (std::vector<laq_row> & of_head : res[ikv]) {
                of_head.push_back({ pos, (int32_t) cell });
            }
        }
    }
    return res;
}

laq_reselection::result laq_reselection::run() {
    begin();
    params.n_kv_budget = n_kept();
    const size_t n     = laq.layers.size();
    old                = {};
    rows.assign(n, {});
    recalled.assign(n, {});
    candidates.assign(n, {});
    for (uint32_t ikv = 0; ikv < n; ++ikv) {
        const result res = run_layer(ikv);
        if (res != result::DONE) {
            return res;
        }
    }
    return result::DONE;
}

// one column for each token that some head could choose
void laq_reselection::keep_scores() const {
    std::set<int32_t> all;
    for (const auto & layer : candidates) {
        for (const auto & of_head : layer) {
            for (const laq_row & row : of_head) {
                all.insert(row.pos);
            }
        }
    }
    const std::vector<int32_t> pos(all.begin(), all.end());
    auto &                     kept = laq.scores[laq.stats.n_evictions % laq_cache::N_DEBUG];
    kept.clear();
    for (uint32_t ikv = 0; ikv < candidates.size(); ++ikv) {
        std::vector<float> & dst = kept.emplace_back(candidates[ikv].size() * pos.size());
        for (uint32_t h = 0; h < candidates[ikv].size(); ++h) {
            const std::vector<laq_row> & of_head = candidates[ikv][h];
            for (size_t i = 0; i < of_head.size(); ++i) {
                const size_t at = std::lower_bound(pos.begin(), pos.end(), of_head[i].pos) - pos.begin();

                dst[h * pos.size() + at] = scores[ikv][h][i];
            }
        }
    }
}

void laq_reselection::upload(const std::vector<uint32_t> & dst) const {
    if (dst.empty()) {
        return;
    }
    std::vector<uint32_t> cells;
    for (uint32_t ikv = 0; ikv < laq.layers.size(); ++ikv) {
        for (int part = 0; part < 2; ++part) {
            laq_cell_rows view(laq, ikv, part == 1, 0, dst.back() + 1, laq.recall->fetched);
            uint64_t      n_bytes = 0;
            for (uint32_t h = 0; h < rows[ikv].size(); ++h) {
                cells.clear();
                for (size_t i = 0; i < rows[ikv][h].size(); ++i) {
                    if (comes_back(part, rows[ikv][h][i])) {
                        cells.push_back(dst[i]);
                    }
                }
                view.set(h, cells, recalled[ikv].bytes[part][h].data());
                n_bytes += recalled[ikv].bytes[part][h].size();
                laq.stats.n_recalled += part == 0 ? cells.size() : 0;
            }
            if (n_bytes > 0) {
                view.write();
                laq.stats.bytes_up += view.n_transferred ? view.n_transferred : n_bytes;
            }
        }
    }
}

bool laq_cache::reselect(const laq_eviction & e, const std::vector<uint32_t> & order,
                         const std::vector<uint8_t> & own) {
    if (std::count(own.begin(), own.end(), 0) > 0) {
        LLAMA_LOG_WARN("%s: cells are shared with another sequence (llama_memory_seq_cp): nothing is recalled\n",
                       __func__);
        return false;
    }
    const std::vector<laq_observation> obs = laq_observations(*this, e);
    if (obs.empty()) {
        return false;
    }
    const int64_t t0 = ggml_time_us();

    laq_reselection s(*this, e, order, obs, fits_to_archive());
    auto            res = s.run();
    // a block of the file that is lost is no longer there to be chosen from
    while (res == laq_reselection::result::LOST) {
        res = s.run();
    }
    if (res == laq_reselection::result::SAME) {
        ++stats.n_recalls_skipped;
    } else {
        if (debug) {
            s.keep_scores();
        }
        std::vector<uint32_t> dst = compact(e, order, own, s.with_ahead());
        s.upload(dst);
        laq_seq & seq = seqs[e.seq_id];
        seq.n_intact  = e.n_intact;
        seq.n_settled = e.n_end;
        seq.remembers = false;
        // What the queries got from the cells alone does not tell of what has come back: nothing is fitted to that.
        seq.fitted      = !s.fitted.empty();
        const double ms = stats.ms_fit;
        fit_values(e, s.fitted, dst);
        stats.ms_recall -= stats.ms_fit - ms;  // it is no part of it
        drop(dst, s.rows[0][0].size());
        seq.ring.forget(e.n_end);
        ++stats.n_recalls;
        ++stats.n_evictions;
    }
    stats.ms_recall += (ggml_time_us() - t0) / 1000.0;
    return res == laq_reselection::result::DONE;
}
