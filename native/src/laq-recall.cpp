#include "laq-recall.h"

#include "laq-threads.h"

#include "llama-impl.h"

#include <algorithm>
#include <numeric>

// a recall while it is made
struct laq_recall_run {
    laq_context &                     laq;
    const laq_plan &                  plan;
    const std::vector<uint32_t> &     order;
    const std::vector<laq_observed> & observed;

    laq_archive &        archive;
    laq_columns          columns;
    std::vector<int32_t> candidates;  // positions before n_end that every head may choose
    laq_params           params;      // n_kv_budget = tokens that are chosen
    laq_scores           scores;      // a column for each position
    laq_choice           choice;
    // archived rows that become resident: K and V of each of n_heads, one after the other, in the type of the cells
    std::vector<std::vector<uint8_t>> recalled[2];

    laq_recall_run(laq_context & laq, const laq_plan & plan, const std::vector<uint32_t> & order,
                   const std::vector<laq_observed> & observed) :
        laq(laq), plan(plan), order(order), observed(observed), archive(*laq.archive_of(plan.seq_id)),
        columns(laq.store, archive), params(laq.params_of(plan.seq_id)) {}

    // whether V of a chosen row is read from the archive: V that was fitted is not what it was
    bool from_archive(int part, int32_t pos, int32_t cell) const {
        return cell < 0 || (part == 1 && laq.seqs[plan.seq_id].fitted && archive.has(pos));
    }

    void begin(bool fits);
    bool score_layer(uint32_t ikv);
    void choose_layer(uint32_t ikv);
    bool fetch_layer(uint32_t ikv);
    bool run(bool fits);
};

// where all tokens are, and how many of them stay
void laq_recall_run::begin(bool fits) {
    const int32_t n = laq.n_tokens(plan.seq_id);
    columns.set(laq.seqs[plan.seq_id], plan.seq_id, GGML_PAD((int64_t) n, laq_archive::N_BLOCK));
    candidates.clear();
    for (int32_t p = 0; p < plan.n_end; ++p) {
        if (columns.has(p)) {
            candidates.push_back(p);
        }
    }
    const uint32_t n_room = laq.n_room(plan.seq_id) - (fits ? order.size() - laq_n_before_end(laq, plan, order) : 0);
    params.n_kv_budget    = std::min({ plan.n_keep, (uint32_t) candidates.size(), n_room });

    scores = { std::vector<float>((size_t) n * laq.store.n_heads), (size_t) n, (uint32_t) observed.size() };
    choice = { params.n_kv_budget, {}, {} };
    choice.pos.resize((size_t) choice.n * laq.store.n_heads);
    choice.cell.resize(choice.pos.size());
    for (auto & bytes : recalled) {
        bytes.assign(laq.store.n_heads, {});
    }
}

// the attention to all tokens in one layer; false: a block of the archive was lost on the way
bool laq_recall_run::score_layer(uint32_t ikv) {
    const laq_layer &      layer   = laq.store.layers[ikv];
    const laq_columns_part part    = { columns, ikv, 0 };
    const int64_t          n       = columns.cell.size();
    laq_compute &          compute = laq.compute;

    compute.begin();
    laq_score_nodes nodes(compute.ctx(), n, observed.size());
    laq_graph_score_columns(compute, nodes, plan.seq_id, part, laq.store.cells(plan.seq_id).used_max_p1());
    compute.alloc("the keys of all tokens of a layer");
    std::vector<int32_t> pos(n);
    for (int32_t p = 0; p < (int32_t) n; ++p) {
        pos[p] = columns.has(p) ? p : INT32_MAX;
    }
    laq_set_observed(nodes.slots, nodes.mask, observed, pos);
    compute.run(laq.n_threads(), "the score graph failed");
    for (uint32_t h = 0; h < layer.n_head_kv; ++h) {
        ggml_backend_tensor_get(nodes.scores[0], scores.rows.data() + (layer.first_head + h) * scores.n,
                                h * nodes.scores[0]->nb[1], scores.n * sizeof(float));
    }
    return !columns.lost;
}

void laq_recall_run::choose_layer(uint32_t ikv) {
    const laq_layer & layer = laq.store.layers[ikv];
    laq_parallel(layer.n_head_kv, candidates.size(), laq.n_threads(), [&](uint32_t h) {
        const size_t       head = layer.first_head + h;
        std::vector<float> s(candidates.size());
        for (size_t i = 0; i < s.size(); ++i) {
            s[i] = scores.rows[head * scores.n + candidates[i]];
        }
        const laq_head_view         view = { candidates.data(), s.data(), (uint32_t) candidates.size(), plan.n_intact };
        const std::vector<uint32_t> kept = laq_keep_of_head(params, ikv, h, view, 0);
        const std::vector<laq_held> held = laq_held_by(laq, plan.seq_id, head, order);
        auto                        at   = held.begin();
        for (uint32_t i = 0; i < choice.n; ++i) {
            const int32_t pos = candidates[kept[i]];
            while (at != held.end() && at->pos < pos) {
                ++at;
            }
            choice.pos[head * choice.n + i]  = pos;
            choice.cell[head * choice.n + i] = at != held.end() && at->pos == pos ? at->cell : -1;
        }
    });
}

// the rows of a layer that become resident; false: a block was lost
bool laq_recall_run::fetch_layer(uint32_t ikv) {
    const laq_layer & layer = laq.store.layers[ikv];
    const size_t      first = (size_t) layer.first_head * choice.n;
    const size_t      last  = first + (size_t) layer.n_head_kv * choice.n;
    for (int part = 0; part < 2; ++part) {
        // where each block begins, if one of its rows is wanted
        std::vector<const uint8_t *>      base(archive.n_blocks());
        std::vector<std::vector<uint8_t>> from_file(base.size());
        for (size_t i = first; i < last; ++i) {
            const uint32_t block = choice.pos[i] / laq_archive::N_BLOCK;
            if (from_archive(part, choice.pos[i], choice.cell[i]) && !base[block]) {
                base[block] = archive.part(block, ikv, part, from_file[block]);
                if (!base[block]) {
                    return false;
                }
            }
        }
        const ggml_type type  = laq.store.part(ikv, part, plan.seq_id)->type;
        const ggml_type there = (ggml_type) archive.type(part);
        const int64_t   n     = layer.n_embd_head(part);
        const size_t    n_row = ggml_row_size(there, n);
        laq_parallel(layer.n_head_kv, choice.n * n, laq.n_threads(), [&](uint32_t h) {
            std::vector<uint8_t> & bytes = recalled[part][layer.first_head + h];
            for (size_t i = first + h * choice.n; i < first + (h + 1) * choice.n; ++i) {
                const int32_t pos = choice.pos[i];
                if (from_archive(part, pos, choice.cell[i])) {
                    const uint8_t * src = laq_archive::row_of(base[pos / laq_archive::N_BLOCK], h, pos, n_row);
                    bytes.resize(bytes.size() + ggml_row_size(type, n));
                    laq_convert(there, src, type, bytes.data() + bytes.size() - ggml_row_size(type, n), n);
                }
            }
        });
    }
    return true;
}

// false: a block was lost, and its tokens are no candidates any more
bool laq_recall_run::run(bool fits) {
    begin(fits);
    for (uint32_t ikv = 0; ikv < laq.store.layers.size(); ++ikv) {
        if (!score_layer(ikv)) {
            return false;
        }
        choose_layer(ikv);
        if (!fetch_layer(ikv)) {
            return false;
        }
    }
    return true;
}

// what the upload needs, before anything changes
struct upload_room {
    laq_host_buffer       fetched;  // tensors that the host does not see
    std::vector<uint32_t> cells;

    upload_room(const laq_context & laq, int32_t seq_id, uint32_t n) {
        cells.reserve(n);
        for (uint32_t ikv = 0; ikv < laq.store.layers.size(); ++ikv) {
            for (int part = 0; part < 2; ++part) {
                const ggml_tensor * t = laq.store.part(ikv, part, seq_id);
                if (!ggml_backend_buffer_is_host(t->buffer)) {
                    fetched.get(laq_device_of(t->buffer), ggml_nbytes(t));
                }
            }
        }
    }
};

// the rows go to the cells that were prepared for them
static void upload(laq_context & laq, const laq_recall_run & run, const std::vector<uint32_t> & dst,
                   upload_room & room) {
    for (uint32_t ikv = 0; ikv < laq.store.layers.size() && !dst.empty(); ++ikv) {
        for (int part = 0; part < 2; ++part) {
            ggml_tensor * t = laq.store.part(ikv, part, run.plan.seq_id);
            laq_cell_rows rows(t, laq.store.lanes(ikv, part), 0, dst.back() + 1, room.fetched);
            uint64_t      n_bytes = 0;
            for (uint32_t h = 0; h < laq.store.layers[ikv].n_head_kv; ++h) {
                const size_t head = laq.store.layers[ikv].first_head + h;
                room.cells.clear();
                for (uint32_t i = 0; i < run.choice.n; ++i) {
                    const size_t at = head * run.choice.n + i;
                    if (run.from_archive(part, run.choice.pos[at], run.choice.cell[at])) {
                        room.cells.push_back(dst[i]);
                    }
                }
                rows.set(h, room.cells, run.recalled[part][head].data());
                n_bytes += run.recalled[part][head].size();
                laq.stats.n_recalled += part == 0 ? room.cells.size() : 0;
            }
            if (n_bytes > 0) {
                rows.write();
                laq.stats.bytes_up += rows.n_transferred ? rows.n_transferred : n_bytes;
            }
        }
    }
}

// false = nothing was done: no query observes, or cells are shared
static bool recall(laq_context & laq, const laq_plan & plan, const std::vector<uint32_t> & order) {
    const std::vector<laq_observed> observed = laq.observed(plan.seq_id, plan.queries, plan.by_probe);
    const std::vector<uint8_t>      own      = laq.store.owned(plan.seq_id, order);
    if (std::find(own.begin(), own.end(), 0) != own.end()) {
        LLAMA_LOG_WARN("%s: cells are shared with another sequence (llama_memory_seq_cp): nothing is recalled\n",
                       __func__);
        return false;
    }
    if (observed.empty()) {
        return false;
    }
    const int64_t t0  = ggml_time_us();
    laq_seq &     seq = laq.seqs[plan.seq_id];

    std::vector<laq_observed> fitted;
    if (laq_policy_fits(laq.params)) {
        fitted = laq_fitted_to(observed, true);
    }
    laq_recall_run run(laq, plan, order, observed);
    for (uint32_t n_lost = 0; !run.run(!fitted.empty());) {
        if (++n_lost > run.columns.cell.size()) {
            throw laq_error(LAQ_STATUS_INTERNAL, "a recall found no rows of a token that is archived");
        }
    }
    if (run.choice.n == run.candidates.size()) {
        fitted.clear();  // all tokens stay: there is nothing to make up for
    }
    upload_room room(laq, plan.seq_id, run.choice.n);
    laq_choice  choice = run.choice;
    if (!fitted.empty()) {
        laq_choose_ahead(laq, plan, order, choice);
    }
    std::vector<uint32_t> positions(run.scores.n);
    std::iota(positions.begin(), positions.end(), 0u);
    laq_keep_scores(laq, run.scores, positions);
    const std::vector<uint32_t> dst = laq_settle(laq, plan, order, own, choice);
    // nothing fails from here on
    upload(laq, run, dst, room);
    seq.evicted(plan.n_intact, plan.n_end, false, true);
    seq.fitted = !fitted.empty();
    laq.stats.ms_recall += (ggml_time_us() - t0) / 1000.0;
    laq_fit(laq, plan, fitted, dst);
    ++laq.stats.n_recalls;
    ++laq.stats.n_evictions;
    return true;
}

void laq_carry_out(laq_context & laq, const laq_plan & plan) {
    laq.ctx->synchronize();  // K and V are read and moved by other ways than the stream that writes them
    const std::vector<uint32_t> order = laq.store.resident(plan.seq_id);
    laq_archive_evicted(laq, plan, order);
    if (plan.recall && recall(laq, plan, order)) {
        return;
    }
    if (!plan.recall || laq_n_before_end(laq, plan, order) > plan.n_keep) {
        laq_evict(laq, plan, order);
    }
}
