// Inputs of the model's graph: where captured queries go, and which columns tokens attend to.

#include "laq-context.h"
#include "laq-graph-capture.h"
#include "laq-graph-columns.h"
#include "laq-hooks.h"

#include "llama-graph.h"
#include "llama-memory.h"

#include <algorithm>
#include <cmath>
#include <cstring>

static laq_layer * layer_of(laq_context & laq, int il) {
    for (laq_layer & layer : laq.store.layers) {
        if (layer.il == il) {
            return &layer;
        }
    }
    return nullptr;
}

template <typename T> static T * find_input(const llm_graph_context & gctx) {
    for (const auto & input : gctx.res->inputs) {
        if (auto * found = dynamic_cast<T *>(input.get())) {
            return found;
        }
    }
    return nullptr;
}

// the sequence of a row; a graph that is reserved has rows of no sequence
static int32_t seq_of(const llama_ubatch & ubatch, uint32_t row) {
    return ubatch.seq_id[row] ? ubatch.seq_id[row][0] : (int32_t) (row / std::max(1u, ubatch.n_seq_tokens));
}

// the sequence whose tokens of a ubatch attend, -1 = none do
static int32_t attending_seq(const laq_context & laq, const llama_ubatch & ubatch) {
    if (laq.now.reserving) {
        return 0;
    }
    if (ubatch.n_seqs_unq > 1) {
        return -1;  // upstream reserves a graph of all sequences, whose rows are of none
    }
    const int32_t s = seq_of(ubatch, 0);
    return !laq.now.probing && s < (int32_t) laq.seqs.size() && laq.attends(s) ? s : -1;
}

//
// capture
//

// rows of a ubatch that are captured: the last ones of each sequence, as many as its ring has slots
static std::vector<int32_t> captured_rows(const laq_context & laq, const llama_ubatch & ubatch) {
    const int32_t         n_seqs = laq.seqs.size();
    std::vector<uint32_t> n_of_seq(n_seqs + 1);
    std::vector<int32_t>  rows;
    for (int32_t i = (int32_t) ubatch.n_tokens - 1; i >= 0; --i) {
        // a unified cache takes more sequences than n_seq_max, which are not ours
        const int32_t  s      = std::min(seq_of(ubatch, i), n_seqs);
        const uint32_t n_most = laq.now.probing ? laq.scratch.size() : s < n_seqs ? laq.seqs[s].ring.size() : 0;
        if (n_of_seq[s] < n_most) {
            ++n_of_seq[s];
            rows.push_back(i);
        }
    }
    std::reverse(rows.begin(), rows.end());
    if (rows.empty()) {
        rows.push_back((int32_t) ubatch.n_tokens - 1);
    }
    return rows;
}

// Slots of the rings for the captured rows of a ubatch. They change from token to token while the graph stays the same,
// so they are an input.
class laq_capture_input : public llm_graph_input_i {
  public:
    // rows: captured_rows() of ubatch
    laq_capture_input(laq_context & laq, const llama_ubatch & ubatch, const std::vector<int32_t> & rows) :
        laq(laq), n(rows.size()), seq_id(attending_seq(laq, ubatch)), is_tail(tail(ubatch, rows)) {}

    void set_input(const llama_ubatch * ubatch) override;

    bool can_reuse(const llm_graph_params & params) override {
        if (params.cparams.laq != &laq || attending_seq(laq, params.ubatch) != seq_id) {
            return false;
        }
        const std::vector<int32_t> rows = captured_rows(laq, params.ubatch);
        return rows.size() == n && tail(params.ubatch, rows) == is_tail;
    }

    laq_context & laq;
    laq_captured  to = {};
    const size_t  n;
    const int32_t seq_id;   // whose tokens attend, which is another graph
    const bool    is_tail;  // the captured rows are the last ones

  private:
    static bool tail(const llama_ubatch & ubatch, const std::vector<int32_t> & rows) {
        return rows.front() + rows.size() == ubatch.n_tokens;
    }
};

// the newest position of each sequence among the captured rows
static std::vector<int32_t> newest_of(const laq_context & laq, const llama_ubatch & ubatch,
                                      const std::vector<int32_t> & rows) {
    std::vector<int32_t> res(laq.seqs.size(), -1);
    for (const int32_t row : rows) {
        const int32_t s = ubatch.seq_id[row][0];
        if (s < (int32_t) res.size()) {
            res[s] = std::max(res[s], ubatch.pos[row]);
        }
    }
    return res;
}

// The slot of a row. The last slot takes what is not ours, and what is older than the ring: no two rows of a graph may
// go to one slot of it.
static int64_t slot_of_row(laq_context & laq, const llama_ubatch & ubatch, int32_t row, bool attends,
                           const std::vector<int32_t> & newest) {
    const int32_t s   = ubatch.seq_id[row][0];
    const int32_t pos = ubatch.pos[row];
    if (s >= (int32_t) laq.seqs.size()) {
        return laq.facts.n_slots - 1;
    }
    laq_seq &  seq    = laq.seqs[s];
    laq_ring & ring   = laq.now.probing ? laq.scratch : seq.ring;
    const bool is_all = !laq.now.probing && (seq.n_intact == 0 || attends);
    if (pos + (int32_t) ring.size() <= newest[s]) {
        return laq.facts.n_slots - 1;
    }
    ring.put(pos, is_all ? laq_output::ALL : laq_output::CELLS);
    return ring.slot_of(pos);
}

// what a sequence knows of the tokens that are decoded now
static void note_tokens(laq_context & laq, const llama_ubatch & ubatch, bool attends) {
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const int32_t s = ubatch.seq_id[i][0];
        if (s >= (int32_t) laq.seqs.size() || laq.now.probing || !laq.archive_of(s)) {
            continue;
        }
        laq_seq & seq = laq.seqs[s];
        if (seq.n_intact > 0 && !attends) {
            seq.n_exact = std::min(seq.n_exact, ubatch.pos[i]);
        }
        if (ubatch.token) {
            seq.history.note(ubatch.pos[i], ubatch.token[i]);
        }
    }
}

void laq_capture_input::set_input(const llama_ubatch * ubatch) {
    GGML_ASSERT(ggml_backend_buffer_is_host(to.slots->buffer));
    const bool                 attends = attending_seq(laq, *ubatch) >= 0;
    const std::vector<int32_t> rows    = captured_rows(laq, *ubatch);
    const std::vector<int32_t> newest  = newest_of(laq, *ubatch, rows);
    for (size_t i = 0; i < rows.size(); ++i) {
        ((int64_t *) to.slots->data)[i] = slot_of_row(laq, *ubatch, rows[i], attends, newest);
    }
    if (to.rows) {
        memcpy(to.rows->data, rows.data(), rows.size() * sizeof(int32_t));
    }
    laq.stats.n_decoded += ubatch->n_tokens;
    note_tokens(laq, *ubatch, attends);
}

static const laq_captured & captured(laq_context & laq, const llm_graph_context & gctx) {
    auto * found = find_input<laq_capture_input>(gctx);
    if (found) {
        return found->to;
    }
    auto input      = std::make_unique<laq_capture_input>(laq, gctx.ubatch, captured_rows(laq, gctx.ubatch));
    input->to.slots = ggml_new_tensor_1d(gctx.ctx0, GGML_TYPE_I64, input->n);
    ggml_set_input(input->to.slots);
    ggml_set_name(input->to.slots, "laq_inp_slots");
    if (!input->is_tail) {
        input->to.rows = ggml_new_tensor_1d(gctx.ctx0, GGML_TYPE_I32, input->n);
        ggml_set_input(input->to.rows);
        ggml_set_name(input->to.rows, "laq_inp_rows");
    }
    return static_cast<laq_capture_input *>(gctx.res->add_input(std::move(input)))->to;
}

void laq_graph_capture(laq_context & laq, const llm_graph_context & gctx, ggml_tensor * q, ggml_tensor * kq_b,
                       ggml_tensor * sinks, float kq_scale, int il) {
    if (laq_layer * layer = layer_of(laq, il)) {
        layer->kq_scale = kq_scale;
        layer->sinks    = sinks;
        layer->has_bias = kq_b != nullptr;
        laq_graph_queries(gctx.ctx0, gctx.gf, *layer, q, captured(laq, gctx));
    }
}

void laq_graph_capture_output(laq_context & laq, const llm_graph_context & gctx, ggml_tensor * out, int il) {
    const laq_layer * layer = layer_of(laq, il);
    if (layer && laq.facts.with_outputs) {
        laq_graph_outputs(gctx.ctx0, gctx.gf, *layer, out, captured(laq, gctx));
    }
}

//
// attend
//

static uint32_t n_columns(const laq_context & laq, int32_t seq_id) {
    // as upstream pads the cells that it looks at
    return GGML_PAD(laq.now.reserving ? (int32_t) laq.n_ctx : laq.n_tokens(seq_id), 256);
}

// columns [first, last) of a row of the mask are not seen
static void hide(const ggml_tensor * mask, int64_t token, int64_t first, int64_t last) {
    char * row = (char *) mask->data + token * mask->nb[1];
    if (mask->type == GGML_TYPE_F16) {
        std::fill((ggml_fp16_t *) row + first, (ggml_fp16_t *) row + last, (ggml_fp16_t) 0xFC00);  // -inf
    } else {
        std::fill((float *) row + first, (float *) row + last, -INFINITY);
    }
}

// Which columns a ubatch sees. They change from token to token while the graph stays the same, so they are an input.
class laq_attend_input : public llm_graph_input_i {
  public:
    laq_attend_input(laq_context & laq, int32_t seq_id, int64_t n) :
        laq(laq), seq_id(seq_id), n(n), columns(laq.store, *laq.archive_of(seq_id)) {}

    void set_input(const llama_ubatch * ubatch) override;

    bool can_reuse(const llm_graph_params & params) override {
        return params.cparams.laq == &laq && attending_seq(laq, params.ubatch) == seq_id &&
               n_columns(laq, seq_id) == n && mask->ne[1] == params.ubatch.n_tokens;
    }

    laq_context & laq;
    const int32_t seq_id;
    const int64_t n;
    laq_columns   columns;
    ggml_tensor * mask = nullptr;  // F16 or F32 [n, n_tokens]

    std::vector<std::unique_ptr<laq_columns_part>> parts;
};

void laq_attend_input::set_input(const llama_ubatch * ubatch) {
    GGML_ASSERT(ggml_backend_buffer_is_host(mask->buffer));
    columns.set(laq.seqs[seq_id], seq_id, n);
    memset(mask->data, 0, ggml_nbytes(mask));
    for (int64_t p = 0; p < n; ++p) {
        if (!columns.has(p)) {
            for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
                hide(mask, i, p, p + 1);
            }
        }
    }
    for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
        hide(mask, i, ubatch->pos[i] + 1, n);
    }
    laq.stats.n_attended += ubatch->n_tokens;
}

static laq_attend_input & attended(laq_context & laq, const llm_graph_context & gctx, int32_t seq_id) {
    auto * found = find_input<laq_attend_input>(gctx);
    if (found) {
        return *found;
    }
    auto            input = std::make_unique<laq_attend_input>(laq, seq_id, n_columns(laq, seq_id));
    const ggml_type type  = gctx.cparams.flash_attn ? GGML_TYPE_F16 : GGML_TYPE_F32;
    input->mask           = ggml_new_tensor_4d(gctx.ctx0, type, input->n, gctx.n_tokens, 1, 1);
    ggml_set_input(input->mask);
    ggml_set_name(input->mask, "laq_inp_mask");
    return *static_cast<laq_attend_input *>(gctx.res->add_input(std::move(input)));
}

void laq_graph_attend(laq_context & laq, const llm_graph_context & gctx, ggml_tensor *& k, ggml_tensor *& v,
                      ggml_tensor *& kq_mask, int il) {
    const laq_layer * layer  = layer_of(laq, il);
    const int32_t     seq_id = layer ? attending_seq(laq, gctx.ubatch) : -1;
    if (seq_id < 0) {
        return;
    }
    laq_attend_input & input = attended(laq, gctx, seq_id);
    const uint32_t     ikv   = layer - laq.store.layers.data();

    const auto all = [&](ggml_tensor * cells, int part) {
        input.parts.push_back(std::make_unique<laq_columns_part>(laq_columns_part{ input.columns, ikv, part }));
        ggml_tensor * res = laq_graph_columns(gctx.ctx0, cells, *input.parts.back(), input.n);
        ggml_backend_sched_set_tensor_backend(gctx.sched, res, gctx.backend_cpu);
        return res;
    };
    k       = all(k, 0);
    v       = all(v, 1);
    kq_mask = input.mask;
}

void laq_graph_reserve(laq_context & laq, bool sampling) {
    laq.now.sampling = sampling;
    if (laq.params.archive == 0) {
        return;
    }
    const laq_during during(laq.now.reserving, true);
    const auto       mctx = laq.ctx->get_memory()->init_full();
    const uint32_t   n    = std::min(laq.ctx->n_ubatch(), laq.facts.n_attend);
    if (!laq.ctx->graph_reserve(n, 1, n, mctx.get())) {
        throw laq_error(LAQ_STATUS_NO_MEMORY, "no memory to attend to the archive: use a smaller n_ctx");
    }
    laq.ctx->get_gf_res_reserve()->reset();
}
