// What goes to the archive: a prefix of the sequence, but for what was lost. Every head holds some of it, and all of what
// comes after it.

#include "laq-recall.h"

#include "laq-threads.h"

#include "llama-impl.h"

#include <algorithm>
#include <cstring>

//
// construction
//

static std::vector<laq_archive_layer> archive_layers(const laq_cache & laq, const ggml_type * type) {
    std::vector<laq_archive_layer> res;
    for (const laq_layer & layer : laq.layers) {
        res.push_back({ layer.n_head_kv,
                        { ggml_row_size(type[0], layer.n_embd_head_k), ggml_row_size(type[1], layer.n_embd_head_v) } });
    }
    return res;
}

static ggml_type archive_type(const laq_cache & laq, const ggml_tensor * t, uint32_t n_embd_head) {
    if (laq.params.archive_type < 0) {
        return t->type;
    }
    const ggml_type type = (ggml_type) laq.params.archive_type;
    const auto      fits = [&] {
        const ggml_type_traits * traits = ggml_get_type_traits(type);
        return (type == GGML_TYPE_F32 || (traits->to_float && traits->from_float_ref)) &&
               n_embd_head % ggml_blck_size(type) == 0 &&
               ggml_row_size(type, n_embd_head) <= ggml_row_size(t->type, n_embd_head);
    };
    if (type != t->type && (type >= GGML_TYPE_COUNT || !fits())) {
        throw laq_error(LAQ_STATUS_INVALID_ARGUMENT,
                        "kv_recall_type cannot hold heads of " + std::to_string(n_embd_head) + " from a cache of " +
                            ggml_type_name(t->type) + " in fewer bytes: leave it out for the cache's own type");
    }
    return type;
}

static const laq_cache & checked(const laq_cache & laq) {
    if (laq.seqs.size() != 1) {
        throw laq_error(LAQ_STATUS_UNSUPPORTED, "kv_recall takes a context of one sequence (n_seq_max = 1)");
    }
    if (!laq_policy_needs_queries(laq.params)) {
        throw laq_error(LAQ_STATUS_INVALID_ARGUMENT,
                        "kv_recall chooses by attention: use kv_policy = laq, laq++ or snapkv");
    }
    return laq;
}

laq_recall_state::laq_recall_state(const laq_cache & laq) :
    type{ archive_type(checked(laq), laq.k(0), laq.layers[0].n_embd_head_k),
          archive_type(laq, laq.v(0), laq.layers[0].n_embd_head_v) },
    archive(archive_layers(laq, type), laq.params.archive_limit,
            laq.params.archive_folder ? laq.params.archive_folder : "",
            [](const std::string & what) { LLAMA_LOG_WARN("laq_archive: %s\n", what.c_str()); }),
    scorer(laq.ctx->get_cparams().n_threads_batch) {
    // what is decoded ahead takes slots, too
    const laq_params & p = laq.params;
    pos.assign(p.n_probe + p.n_lookahead + std::max({ p.n_window, p.n_window_snapkv, p.n_reread }), -1);
    token.resize(pos.size());
}

ggml_type laq_recall_state::row_type(const laq_cache & laq, int part) const {
    const ggml_type in_cache = laq_part_of(laq, 0, part)->type;
    return type[part] == in_cache ? in_cache : GGML_TYPE_F32;
}

void laq_recall_state::note(const llama_ubatch & ubatch) {
    for (uint32_t i = 0; i < ubatch.n_tokens && ubatch.token; ++i) {
        if (ubatch.seq_id[i][0] == 0) {
            const size_t slot = ubatch.pos[i] % pos.size();
            pos[slot]         = ubatch.pos[i];
            token[slot]       = ubatch.token[i];
        }
    }
}

void laq_recall_state::forget(int32_t p0) {
    for (int32_t & p : pos) {
        p = p >= p0 ? -1 : p;
    }
}

std::vector<llama_token> laq_recall_state::tail(const laq_cache & laq, int32_t seq_id, int32_t n_prompt,
                                                uint32_t n_most) const {
    const int32_t n = std::min<int32_t>(n_most, pos.size());

    int32_t p = n_prompt;
    while (p > laq.seqs[seq_id].n_intact && n_prompt - p < n && pos[(p - 1) % pos.size()] == p - 1) {
        --p;
    }
    std::vector<llama_token> res;
    for (; p < n_prompt; ++p) {
        res.push_back(token[p % token.size()]);
    }
    return res;
}

uint32_t laq_n_archived(const laq_cache & laq, int32_t seq_id, uint32_t ikv, uint32_t h,
                        const std::vector<uint32_t> & order) {
    return std::count_if(order.begin(), order.end(),
                         [&](uint32_t cell) { return laq.recall->archive.has(laq.pos_at(seq_id, ikv, h, cell)); });
}

bool laq_holds_archive(const laq_cache & laq, int32_t seq_id, const std::vector<uint32_t> & order) {
    const size_t n = laq.recall->archive.positions().size();
    for (uint32_t ikv = 0; ikv < laq.layers.size(); ++ikv) {
        for (uint32_t h = 0; h < laq.layers[ikv].n_head_kv; ++h) {
            if (laq_n_archived(laq, seq_id, ikv, h, order) < n) {
                return false;
            }
        }
    }
    return true;
}

bool laq_cache::may_recall(int32_t seq_id, laq_recall_when when) const {
    return recall && seq_id == 0 && params.recall >= when;
}

bool laq_cache::recalls(int32_t seq_id, laq_recall_when when) const {
    return may_recall(seq_id, when) && recall->archive.n_held() > 0;
}

//
// rows of one type as rows of another
//

void laq_convert(ggml_type from, const uint8_t * src, ggml_type to, uint8_t * dst, int64_t n) {
    constexpr int64_t N_STEP = 256;  // whole blocks of every type

    if (from == to) {
        memcpy(dst, src, ggml_row_size(from, n));
        return;
    }
    float values[N_STEP];
    for (int64_t i = 0; i < n; i += N_STEP) {
        const int64_t   n_now = std::min(N_STEP, n - i);
        const uint8_t * s     = src + ggml_row_size(from, i);
        uint8_t *       d     = dst + ggml_row_size(to, i);
        if (from == GGML_TYPE_F32) {
            memcpy(values, s, n_now * sizeof(float));
        } else {
            ggml_get_type_traits(from)->to_float(s, values, n_now);
        }
        if (to == GGML_TYPE_F32) {
            memcpy(d, values, n_now * sizeof(float));
        } else {
            ggml_get_type_traits(to)->from_float_ref(values, d, n_now);
        }
    }
}

const ggml_tensor * laq_part_of(const laq_cache & laq, uint32_t ikv, int part) {
    return part == 0 ? laq.k(ikv) : laq.v(ikv);
}

int64_t laq_n_embd_of(const laq_cache & laq, uint32_t ikv, int part) {
    return part == 0 ? laq.layers[ikv].n_embd_head_k : laq.layers[ikv].n_embd_head_v;
}

//
// to the archive
//

static void archive_rows(laq_cache & laq, const std::vector<int32_t> & pos, const std::vector<uint32_t> & cells) {
    laq_recall_state & r     = *laq.recall;
    const auto [first, last] = std::minmax_element(cells.begin(), cells.end());

    r.archive.open(pos);
    for (uint32_t ikv = 0; ikv < laq.layers.size(); ++ikv) {
        for (int part = 0; part < 2; ++part) {
            const ggml_type     type   = laq_part_of(laq, ikv, part)->type;
            const int64_t       n      = laq_n_embd_of(laq, ikv, part);
            const uint32_t      n_head = laq.layers[ikv].n_head_kv;
            const laq_cell_rows view(laq, ikv, part == 1, *first, *last + 1, r.fetched);
            // of each head, since what the archive allocated is touched first here, which takes longer than the copy
            laq_parallel(n_head, cells.size() * n, laq.n_threads(), [&](uint32_t h) {
                std::vector<uint8_t> turned(view.row_size());
                for (size_t i = 0; i < cells.size(); ++i) {
                    laq_convert(type, view.row(h, cells[i], turned.data()), r.type[part],
                                r.archive.row(pos[i], ikv, part, h), n);
                }
            });
            laq.stats.bytes_down += view.n_transferred ? view.n_transferred : n_head * cells.size() * view.row_size();
        }
    }
    r.archive.close(pos);
}

void laq_archive_leaving(laq_cache & laq, const laq_eviction & e, const std::vector<uint32_t> & order) {
    constexpr size_t N_STEP = 1024;  // tokens that are in host memory at least, whatever the limit

    laq_archive &        archive = laq.recall->archive;
    const int32_t        begin   = laq.seqs[e.seq_id].n_intact;
    const int32_t        end     = std::min(e.n_intact, e.n_end);
    std::vector<int32_t> pos;
    for (size_t i = 0; i < order.size();) {
        std::vector<uint32_t> cells;
        for (pos.clear(); i < order.size() && pos.size() < N_STEP; ++i) {
            const int32_t p = laq.cells().pos_get(order[i]);
            if (p >= begin && p < end && !archive.has(p)) {
                pos.push_back(p);
                cells.push_back(order[i]);
            }
        }
        if (pos.empty()) {
            continue;
        }
        try {
            archive_rows(laq, pos, cells);
        } catch (const std::bad_alloc &) {
            archive.n_lost += pos.size() * archive.rows_of_token();
            LLAMA_LOG_WARN("%s: %zu tokens are lost: no host memory; set kv_recall_limit\n", __func__, pos.size());
        }
    }
}
