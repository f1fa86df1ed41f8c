// The two pieces of graph: query capture inside the model's graph, and the score graph of an eviction.

#include "laq-graph.h"

#include "laq-cache.h"
#include "laq-fit.h"
#include "laq-move.h"
#include "laq-score.h"

#include "ggml-backend.h"
#include "llama-graph.h"
#include "llama-impl.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <set>

//
// query capture
//

// Slots of the rings for the last queries of a ubatch. They change from token to token while the graph stays the same,
// so they are an input.
class laq_graph_input : public llm_graph_input_i {
  public:
    laq_graph_input(laq_cache & laq, int64_t n, bool attends) : laq(laq), n(n), attends(attends) {}

    void set_input(const llama_ubatch * ubatch) override {
        GGML_ASSERT(ggml_backend_buffer_is_host(slots->buffer));
        laq.capture(*ubatch, n, (int64_t *) slots->data);
    }

    bool can_reuse(const llm_graph_params & params) override {
        return params.cparams.laq == &laq && laq.n_captured(params.ubatch.n_tokens) == n &&
               laq.attends(params.ubatch) == attends;
    }

    laq_cache &   laq;
    ggml_tensor * slots = nullptr;  // I64 [n]
    const int64_t n;
    const bool    attends;
};

static laq_graph_input * capture_input(laq_cache & laq, const llm_graph_context & gctx, int64_t n) {
    for (const auto & input : gctx.res->inputs) {
        if (auto * found = dynamic_cast<laq_graph_input *>(input.get())) {
            return found;
        }
    }
    auto input   = std::make_unique<laq_graph_input>(laq, n, laq.attends(gctx.ubatch));
    input->slots = ggml_new_tensor_1d(gctx.ctx0, GGML_TYPE_I64, n);
    ggml_set_input(input->slots);
    ggml_set_name(input->slots, "laq_inp_slots");

    return (laq_graph_input *) gctx.res->add_input(std::move(input));
}

static laq_layer * layer_of(laq_cache & laq, int il) {
    const auto it = std::find_if(laq.layers.begin(), laq.layers.end(), [&](const auto & l) { return l.il == il; });
    return it == laq.layers.end() ? nullptr : &*it;
}

ggml_tensor * laq_ring_view(ggml_context * ctx, const laq_layer & layer, bool outputs) {
    ggml_tensor * ring = layer.ring;
    return ggml_view_2d(ctx, ring, outputs ? layer.n_ring_out() : layer.n_ring_q(), ring->ne[1], ring->nb[1],
                        outputs ? layer.n_ring_q() * ring->nb[0] : 0);
}

// rows: [n_row, n_tokens], of which the last n are captured
static void capture_rows(laq_cache & laq, const llm_graph_context & gctx, ggml_tensor * ring, ggml_tensor * rows,
                         int64_t n) {
    ggml_tensor * last = ggml_view_2d(gctx.ctx0, rows, rows->ne[0], n, rows->nb[1], (rows->ne[1] - n) * rows->nb[1]);
    ggml_build_forward_expand(gctx.gf, ggml_set_rows(gctx.ctx0, ring, last, capture_input(laq, gctx, n)->slots));
}

void laq_graph_capture(laq_cache & laq, const llm_graph_context & gctx, ggml_tensor * q, ggml_tensor * kq_b,
                       ggml_tensor * sinks, float kq_scale, int il) {
    laq_layer * layer = layer_of(laq, il);
    if (!layer) {
        return;
    }
    layer->kq_scale = kq_scale;
    layer->sinks    = sinks;
    layer->has_bias = kq_b != nullptr;

    if (q->nb[1] != q->ne[0] * q->nb[0]) {
        q = ggml_cont(gctx.ctx0, q);
    }
    ggml_tensor * rows = ggml_view_2d(gctx.ctx0, q, q->ne[0] * q->ne[1], q->ne[2], q->nb[2], 0);
    capture_rows(laq, gctx, laq_ring_view(gctx.ctx0, *layer, false), rows, laq.n_captured(q->ne[2]));
}

void laq_graph_capture_output(laq_cache & laq, const llm_graph_context & gctx, ggml_tensor * out, int il) {
    const laq_layer * layer = layer_of(laq, il);
    if (layer && laq.captures_outputs) {
        capture_rows(laq, gctx, laq_ring_view(gctx.ctx0, *layer, true), out, laq.n_captured(out->ne[1]));
    }
}

//
// scores
//

ggml_backend_dev_t laq_device_of(ggml_backend_buffer_t buffer) {
    const ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(buffer);
    if (ggml_backend_dev_t dev = ggml_backend_buft_get_device(buft)) {
        return dev;
    }
    return ggml_backend_buft_is_host(buft) ? ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU) : nullptr;
}

void laq_set_threads(ggml_backend_t backend, int n_threads) {
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));
    if (auto * set =
            (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads")) {
        set(backend, n_threads);
    }
}

void laq_graph_place(ggml_backend_sched_t sched, ggml_tensor * node, const ggml_tensor * beside) {
    const ggml_backend_dev_t dev = laq_device_of(beside->buffer);
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        ggml_backend_t backend = ggml_backend_sched_get_backend(sched, i);
        if (ggml_backend_get_device(backend) == dev) {
            ggml_backend_sched_set_tensor_backend(sched, node, backend);
            return;
        }
    }
}

std::string laq_what_has(ggml_backend_dev_t dev, bool supported, ggml_type type_k, int64_t n_embd_head) {
    return std::string(dev ? ggml_backend_dev_name(dev) : "the device") + " has " + (supported ? "the" : "no") +
           " score kernel for " + ggml_type_name(type_k) + " keys of " + std::to_string(n_embd_head);
}

bool laq_score_fused(const ggml_tensor * op, ggml_backend_dev_t dev, laq_score_kernel kernel) {
    const bool supported = dev && ggml_backend_dev_supports_op(dev, op);
    if (kernel == LAQ_SCORE_KERNEL_FUSED && !supported) {
        throw laq_error(LAQ_STATUS_UNSUPPORTED,
                        "score_kernel = fused: " + laq_what_has(dev, false, op->src[1]->type, op->src[1]->ne[0]) +
                            "; use score_kernel = auto");
    }
    return supported && kernel != LAQ_SCORE_KERNEL_COMPOSED;
}

ggml_tensor * laq_attention(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * mask,
                            ggml_tensor * sinks, float scale, float softcap) {
    const int64_t n_kv      = k->ne[1];
    const int64_t n_head_kv = k->ne[2];

    ggml_tensor * kq = ggml_mul_mat(ctx, k, ggml_cont(ctx, q));  // [n_kv, n_q, n_head]
    ggml_prec_set_acc(kq, GGML_PREC_F32);

    if (softcap != 0.0f) {
        kq    = ggml_scale(ctx, ggml_tanh(ctx, ggml_scale(ctx, kq, scale / softcap)), softcap);
        scale = 1.0f;
    }
    kq = ggml_soft_max_ext(ctx, kq, mask, scale, 0.0f);
    ggml_soft_max_add_sinks(kq, sinks);

    // the heads of a group lie next to each other
    return ggml_reshape_3d(ctx, kq, n_kv, q->ne[1] * q->ne[2] / n_head_kv, n_head_kv);
}

ggml_tensor * laq_score_composed(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * mask,
                                 ggml_tensor * sinks, float scale, float softcap) {
    const int64_t n_head_kv = k->ne[2];
    const int64_t n_group   = q->ne[2] / n_head_kv;

    // sum over the rows
    ggml_tensor * kq = laq_attention(ctx, q, k, mask, sinks, scale, softcap);
    kq               = ggml_sum_rows(ctx, ggml_cont(ctx, ggml_transpose(ctx, kq)));
    return ggml_reshape_2d(ctx, ggml_scale(ctx, kq, 1.0f / (float) n_group), k->ne[1], n_head_kv);
}

// inputs and outputs of a score graph
struct score_graph {
    ggml_tensor *              slots;  // I32 [n_q]
    ggml_tensor *              mask;   // F32 [n_kv, n_q]
    std::vector<ggml_tensor *> res;    // per KV layer F32 [n_kv, n_head_kv]
};

static score_graph build_score_graph(laq_cache & laq, llm_graph_result & res, int64_t n_kv, int64_t n_q) {
    res.reset();
    ggml_context *       ctx   = res.get_ctx();
    ggml_cgraph *        gf    = res.get_gf();
    ggml_backend_sched_t sched = laq.ctx->get_sched();
    ggml_backend_sched_reset(sched);

    score_graph sg;
    sg.slots = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_q);
    sg.mask  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_kv, n_q);
    ggml_set_input(sg.slots);
    ggml_set_input(sg.mask);

    for (uint32_t ikv = 0; ikv < laq.layers.size(); ++ikv) {
        laq_layer &   layer = laq.layers[ikv];
        const int64_t d     = layer.n_embd_head_k;
        ggml_tensor * cache = laq.k(ikv);

        ggml_tensor * q = ggml_get_rows(ctx, laq_ring_view(ctx, layer, false), sg.slots);
        laq_graph_place(sched, q, cache);
        q = ggml_reshape_3d(ctx, q, d, layer.n_head, n_q);
        q = ggml_permute(ctx, q, 0, 2, 1, 3);
        ggml_tensor * k =
            ggml_view_3d(ctx, cache, d, n_kv, layer.n_head_kv, cache->nb[1], ggml_row_size(cache->type, d), 0);

        ggml_tensor * out = ggml_laq_score(ctx, q, k, sg.mask, layer.sinks, layer.kq_scale, layer.softcap);

        layer.fused = laq_score_fused(out, laq_device_of(cache->buffer), (laq_score_kernel) laq.params.score_kernel);
        if (!layer.fused) {
            out = laq_score_composed(ctx, q, k, sg.mask, layer.sinks, layer.kq_scale, layer.softcap);
        }

        laq_graph_place(sched, out, cache);
        ggml_set_output(out);
        ggml_build_forward_expand(gf, out);
        sg.res.push_back(out);
    }
    return sg;
}

// which kernel scores, and why: it stays so while the cache is attached
static void note_kernels(laq_cache & laq) {
    std::set<std::string> reasons;
    laq.stats.score_fused = true;
    for (uint32_t ikv = 0; ikv < laq.layers.size(); ++ikv) {
        const laq_layer &   layer = laq.layers[ikv];
        const ggml_tensor * k     = laq.k(ikv);
        reasons.insert(laq.params.score_kernel == LAQ_SCORE_KERNEL_COMPOSED
                           ? "score_kernel = composed was asked for"
                           : laq_what_has(laq_device_of(k->buffer), layer.fused, k->type, layer.n_embd_head_k));
        laq.stats.score_fused = laq.stats.score_fused && layer.fused;
    }
    laq.score_reason.clear();
    for (const std::string & reason : reasons) {
        laq.score_reason += (laq.score_reason.empty() ? "" : "; ") + reason;
    }
}

void laq_graph_reserve(laq_cache & laq) {
    if (laq.by_graph) {
        laq_graph_reserve_moves(laq);
    }
    if (!laq.can_score && !laq_policy_scores(laq.params)) {
        return;
    }
    llm_graph_result * res = laq.ctx->get_gf_res_reserve();
    const int64_t      n_q = std::max(laq.seqs[0].ring.pos.size(), laq.scratch.pos.size());
    build_score_graph(laq, *res, laq.n_cells(), n_q);
    note_kernels(laq);
    laq.can_score = true;
    if (!ggml_backend_sched_reserve(laq.ctx->get_sched(), res->get_gf())) {
        throw laq_error(LAQ_STATUS_NO_MEMORY,
                        "no memory for the score graph: use a smaller kv_staging, kv_budget or window_size");
    }
    res->reset();
    if (laq.captures_outputs) {
        laq_graph_reserve_fit(laq);
    }
    if (laq.can_attend) {
        laq_graph_reserve_attend(laq);
    }
}

// Of queries below n_intact the mask would not be exact: the heads hold different tokens there, and the cell table names
// one of them.
std::vector<laq_observation> laq_observations(const laq_cache & laq, const laq_eviction & e) {
    const laq_seq &  seq   = laq.seqs[e.seq_id];
    const laq_ring & ring  = e.scratch ? laq.scratch : seq.ring;
    const int32_t    first = std::max({ e.queries.first, seq.n_intact, e.queries.last - (int32_t) ring.pos.size() });

    std::vector<laq_observation> res;
    for (int32_t pos = first; pos < e.queries.last; ++pos) {
        const int32_t slot = ring.slot_of(pos);
        const int32_t at   = slot - ring.first;
        if (ring.pos[at] == pos) {
            res.push_back({ slot, pos, ring.exact[at] != 0 });
        }
    }
    return res;
}

void laq_set_observed(ggml_tensor * slots, ggml_tensor * mask, const std::vector<laq_observation> & obs,
                      const std::vector<int32_t> & pos) {
    std::vector<int32_t> all_slots;
    std::vector<float>   visible;
    for (const laq_observation & o : obs) {
        all_slots.push_back(o.slot);
        std::transform(pos.begin(), pos.end(), std::back_inserter(visible),
                       [&](int32_t p) { return p <= o.pos ? 0.0f : -INFINITY; });
    }
    ggml_backend_tensor_set(slots, all_slots.data(), 0, ggml_nbytes(slots));
    ggml_backend_tensor_set(mask, visible.data(), 0, ggml_nbytes(mask));
}

// Positions of the first n cells, as far as they are of a sequence.
static std::vector<int32_t> positions_of(const laq_cache & laq, int32_t seq_id, int64_t n) {
    std::vector<int32_t> pos(n, INT32_MAX);
    for (int64_t i = 0; i < n; ++i) {
        if (!laq.cells().is_empty(i) && laq.cells().seq_has(i, seq_id)) {
            pos[i] = laq.cells().pos_get(i);
        }
    }
    return pos;
}

laq_scores laq_cache::score(const laq_eviction & e, const std::vector<uint32_t> & order) {
    const std::vector<laq_observation> obs = laq_observations(*this, e);
    if (obs.empty()) {
        return {};
    }
    ggml_backend_sched_t sched = ctx->get_sched();
    llm_graph_result *   res   = ctx->get_gf_res_reserve();

    const score_graph sg = build_score_graph(*this, *res, cells().used_max_p1(), obs.size());
    if (!ggml_backend_sched_alloc_graph(sched, res->get_gf())) {
        throw laq_error(LAQ_STATUS_NO_MEMORY, "no memory for the score graph: use a smaller window_size");
    }
    laq_set_observed(sg.slots, sg.mask, obs, positions_of(*this, e.seq_id, sg.mask->ne[0]));
    if (ctx->graph_compute(res->get_gf(), true) != GGML_STATUS_SUCCESS) {
        throw laq_error(LAQ_STATUS_COMPUTE_FAILED, "the score graph was aborted or failed");
    }
    ggml_backend_sched_synchronize(sched);

    laq_scores         out;
    std::vector<float> raw;
    out.n_queries = obs.size();
    for (ggml_tensor * t : sg.res) {
        raw.resize(ggml_nelements(t));
        ggml_backend_tensor_get(t, raw.data(), 0, ggml_nbytes(t));

        std::vector<float> & dst = out.rows.emplace_back(t->ne[1] * order.size());
        for (int64_t h = 0; h < t->ne[1]; ++h) {
            std::transform(order.begin(), order.end(), dst.begin() + h * order.size(),
                           [&](uint32_t cell) { return raw[h * t->ne[0] + cell]; });
        }
    }
    return out;
}
