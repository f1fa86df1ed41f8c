// The fit of values: after an eviction V of what stays changes so that the observed queries get what they got from the
// whole cache. Attention Matching (arXiv 2602.16284) solves for the values of a compacted cache alike; here the queries
// are those of the lookahead, and a ridge holds the values where they were.
//
// One KV head, the rows of its query heads below each other (m = n_q * n_group), n tokens that stay:
//   P [m][n]    attention of the observed queries to them
//   X [m][n]    P where V may change, 0 where it may not: pinned tokens stay as they are
//   R [m][d_v]  what the model's own attention gave, less P V
//   V += X^T (X X^T + ridge I)^-1 R
// It is composed of existing operations, so that it runs where K and V are; the small systems are solved by the host.
// Sums over tokens are fast in whole vectors: after the n tokens come a few more, with no attention to them.

#include "laq-fit.h"

#include "laq-cache.h"
#include "laq-graph.h"

#include "ggml-backend.h"
#include "llama-graph.h"
#include "llama-impl.h"

#include <algorithm>
#include <cmath>

//
// the systems
//

static void scale(double * dst, int64_t n, double factor) {
    for (int64_t i = 0; i < n; ++i) {
        dst[i] *= factor;
    }
}

// dst -= the sum of n_rows rows of n numbers, each times its factor; from one row or factor to the next: strides. Four
// rows at a time, so that dst is loaded and stored a fourth as often.
static void subtract(double * dst, const double * rows, int64_t stride, const double * factors, int64_t stride_f,
                     int64_t n_rows, int64_t n) {
    int64_t k = 0;
    for (; k + 4 <= n_rows; k += 4) {
        const double * a = rows + k * stride;
        const double * b = a + stride;
        const double * c = b + stride;
        const double * d = c + stride;
        const double * f = factors + k * stride_f;

        const double fa = f[0], fb = f[stride_f], fc = f[2 * stride_f], fd = f[3 * stride_f];
        for (int64_t i = 0; i < n; ++i) {
            dst[i] -= (fa * a[i] + fb * b[i]) + (fc * c[i] + fd * d[i]);
        }
    }
    for (; k < n_rows; ++k) {
        for (int64_t i = 0; i < n; ++i) {
            dst[i] -= factors[k * stride_f] * rows[k * stride + i];
        }
    }
}

// z [n_rhs][m] = (g + ridge I)^-1 r, with g [m][m] and r [m][n_rhs]; 0 where there is no solution. All sums go along
// rows: sums along columns would wait for one another.
static void solve(const float * g, const float * r, double ridge, int64_t m, int64_t n_rhs, float * z) {
    std::vector<double> u(g, g + m * m);  // the upper triangle becomes Cholesky's: g + ridge I = u^T u
    std::vector<double> x(r, r + m * n_rhs);
    for (int64_t i = 0; i < m; ++i) {
        double * row = u.data() + i * m;
        double * x_i = x.data() + i * n_rhs;
        subtract(row + i, u.data() + i, m, u.data() + i, m, i, m - i);
        subtract(x_i, x.data(), n_rhs, u.data() + i, m, i, n_rhs);
        row[i] += ridge;
        if (!(row[i] > 0.0)) {
            std::fill(z, z + m * n_rhs, 0.0f);
            return;
        }
        scale(row + i, m - i, 1.0 / std::sqrt(row[i]));
        scale(x_i, n_rhs, 1.0 / row[i]);
    }
    for (int64_t i = m - 1; i >= 0; --i) {
        const double * row = u.data() + i * m;
        double *       x_i = x.data() + i * n_rhs;
        subtract(x_i, x_i + n_rhs, n_rhs, row + i + 1, 1, m - 1 - i, n_rhs);
        scale(x_i, n_rhs, 1.0 / row[i]);
    }
    for (int64_t i = 0; i < m; ++i) {
        for (int64_t c = 0; c < n_rhs; ++c) {
            z[c * m + i] = (float) x[i * n_rhs + c];
        }
    }
}

// a custom op: dst F32 [m, d_v, n_head_kv] from src[0] = X X^T [m, m, n_head_kv] and src[1] = R [d_v, m, n_head_kv]
static void solve_heads(ggml_tensor * dst, int ith, int nth, void * ridge) {
    const ggml_tensor * g = dst->src[0];
    const ggml_tensor * r = dst->src[1];
    for (int64_t h = ith; h < dst->ne[2]; h += nth) {
        const auto at = [h](const ggml_tensor * t) { return (float *) ((char *) t->data + h * t->nb[2]); };
        solve(at(g), at(r), *(const float *) ridge, dst->ne[0], dst->ne[1], at(dst));
    }
}

//
// the graph
//

namespace {

constexpr int64_t N_VECTOR = 16;  // floats of the longest vector

struct fit_graph {
    ggml_context * ctx;
    ggml_cgraph *  gf;
    int64_t        n_real;  // tokens; below, n is this rounded up

    ggml_tensor * slots = nullptr;  // I32 [n_q]
    ggml_tensor * cells = nullptr;  // I32 [n]
    ggml_tensor * mask  = nullptr;  // F32 [n, n_q]

    std::vector<ggml_tensor *> free;  // per KV layer F32 [n, 1, n_head_kv]: 1 where V may change, 0 where not

    // rows of the ring: [n_embd_head, n_q, n_head]
    ggml_tensor * observed(const laq_layer & layer, bool outputs) const {
        ggml_tensor * rows = ggml_get_rows(ctx, laq_ring_view(ctx, layer, outputs), slots);
        rows               = ggml_reshape_3d(ctx, rows, rows->ne[0] / layer.n_head, layer.n_head, rows->ne[1]);
        return ggml_permute(ctx, rows, 0, 2, 1, 3);
    }

    // attention to the cells: [n, m, n_head_kv]
    ggml_tensor * attention(const laq_layer & layer, ggml_tensor * k) const {
        const int64_t n = cells->ne[0];

        ggml_tensor * keys =
            ggml_reshape_3d(ctx, ggml_get_rows(ctx, k, cells), layer.n_embd_head_k, layer.n_head_kv, n);
        return laq_attention(ctx, observed(layer, false), ggml_permute(ctx, keys, 0, 2, 1, 3), mask, layer.sinks,
                             layer.kq_scale, layer.softcap);
    }
};

}  // namespace

// V of a layer as rows of cells. Where it is transposed: a copy of the first n_from cells, which go back by turn_back()
static ggml_tensor * value_rows(ggml_context * ctx, const laq_cache & laq, ggml_tensor * v, int64_t n_from) {
    if (!laq.v_trans()) {
        return v;
    }
    ggml_tensor * channels = ggml_view_2d(ctx, v, n_from, v->ne[0], v->ne[1] * ggml_type_size(v->type), 0);
    return ggml_cont(ctx, ggml_transpose(ctx, channels));
}

static ggml_tensor * turn_back(ggml_context * ctx, ggml_tensor * v, ggml_tensor * rows) {
    const int64_t n_from   = rows->ne[1];
    ggml_tensor * channels = ggml_view_2d(ctx, v, n_from, v->ne[0], v->ne[1] * ggml_type_size(v->type), 0);
    // in two steps: where CUDA transposes while it copies, it takes what it writes for contiguous (ggml-cuda/cpy.cu)
    return ggml_cpy(ctx, ggml_cont(ctx, ggml_transpose(ctx, rows)), channels);
}

static void add_layer(laq_cache & laq, fit_graph & fg, uint32_t ikv, int64_t n_from) {
    ggml_backend_sched_t sched = laq.ctx->get_sched();
    ggml_context *       ctx   = fg.ctx;
    const laq_layer &    layer = laq.layers[ikv];
    const int64_t        n     = fg.cells->ne[0];
    const int64_t        n_h   = layer.n_head_kv;
    const int64_t        d     = layer.n_embd_head_v;
    ggml_tensor *        v     = laq.v(ikv);

    fg.free.push_back(ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n, 1, n_h));
    ggml_set_input(fg.free.back());

    ggml_tensor * p = fg.attention(layer, laq.k(ikv));
    laq_graph_place(sched, p, v);
    ggml_tensor * x = ggml_mul(ctx, p, fg.free.back());
    ggml_tensor * g = ggml_mul_mat(ctx, x, x);
    ggml_prec_set_acc(g, GGML_PREC_F32);

    ggml_tensor * rows   = value_rows(ctx, laq, v, n_from);
    ggml_tensor * values = ggml_get_rows(ctx, rows, fg.cells);  // [d*n_head_kv, n]
    laq_graph_place(sched, values, v);
    ggml_tensor * by_head = ggml_permute(ctx, ggml_reshape_3d(ctx, values, d, n_h, n), 1, 2, 0, 3);
    ggml_tensor * pv      = ggml_mul_mat(ctx, ggml_cont(ctx, by_head), p);  // [d, m, n_head_kv]
    ggml_prec_set_acc(pv, GGML_PREC_F32);
    ggml_tensor * out = ggml_reshape_3d(ctx, ggml_cont(ctx, fg.observed(layer, true)), d, p->ne[1], n_h);

    ggml_tensor * args[] = { g, ggml_sub(ctx, out, pv) };
    ggml_tensor * z = ggml_custom_4d(ctx, GGML_TYPE_F32, p->ne[1], d, n_h, 1, args, 2, solve_heads, GGML_N_TASKS_MAX,
                                     &laq.params.value_fit);

    ggml_tensor * xt    = ggml_cont(ctx, ggml_transpose(ctx, x));  // [m, n, n_head_kv]
    ggml_tensor * delta = ggml_mul_mat(ctx, z, xt);                // [d, n, n_head_kv]
    ggml_prec_set_acc(delta, GGML_PREC_F32);
    delta = ggml_cont(ctx, ggml_permute(ctx, delta, 0, 2, 1, 3));

    ggml_tensor * fitted = ggml_add(ctx, values, ggml_reshape_2d(ctx, delta, d * n_h, n));
    ggml_tensor * done   = ggml_set_rows(ctx, rows, ggml_view_2d(ctx, fitted, d * n_h, fg.n_real, fitted->nb[1], 0),
                                         ggml_view_1d(ctx, fg.cells, fg.n_real, 0));
    if (laq.v_trans()) {
        done = turn_back(ctx, v, done);
    }
    laq_graph_place(sched, done, v);
    ggml_build_forward_expand(fg.gf, done);
}

static fit_graph build_fit_graph(laq_cache & laq, llm_graph_result & res, int64_t n_real, int64_t n_from, int64_t n_q) {
    res.reset();
    fit_graph     fg = { res.get_ctx(), res.get_gf(), n_real };
    const int64_t n  = GGML_PAD(n_real, N_VECTOR);
    ggml_backend_sched_reset(laq.ctx->get_sched());

    fg.slots = ggml_new_tensor_1d(fg.ctx, GGML_TYPE_I32, n_q);
    fg.cells = ggml_new_tensor_1d(fg.ctx, GGML_TYPE_I32, n);
    fg.mask  = ggml_new_tensor_2d(fg.ctx, GGML_TYPE_F32, n, n_q);
    for (ggml_tensor * input : { fg.slots, fg.cells, fg.mask }) {
        ggml_set_input(input);
    }
    for (uint32_t ikv = 0; ikv < laq.layers.size(); ++ikv) {
        add_layer(laq, fg, ikv, n_from);
    }
    return fg;
}

void laq_graph_reserve_fit(laq_cache & laq) {
    // with an archive, to all queries of a part that is read twice
    const size_t       n_ring = laq.seqs[0].ring.pos.size();
    const size_t       n_q    = laq.recall ? n_ring : std::min<size_t>(n_ring, LAQ_FIT_QUERIES);
    llm_graph_result * res    = laq.ctx->get_gf_res_reserve();
    const fit_graph    fg     = build_fit_graph(laq, *res, laq.n_cells(), laq.n_cells(), n_q);
    if (!ggml_backend_sched_reserve(laq.ctx->get_sched(), fg.gf)) {
        throw laq_error(LAQ_STATUS_NO_MEMORY, "no memory for the fit of values: use value_fit = 0");
    }
    res->reset();
}

//
// an eviction's
//

// [n_head_kv][n], 1 where V of a head may change: what is pinned stays
static std::vector<float> free_of_layer(const laq_cache & laq, const laq_eviction & e, uint32_t ikv,
                                        const std::vector<uint32_t> & dst, int64_t n) {
    const laq_params     p = laq.params_of(e.seq_id);
    std::vector<float>   res(laq.layers[ikv].n_head_kv * n);
    std::vector<int32_t> pos(dst.size());
    for (uint32_t h = 0; h < laq.layers[ikv].n_head_kv; ++h) {
        std::transform(dst.begin(), dst.end(), pos.begin(),
                       [&](uint32_t cell) { return laq.pos_at(e.seq_id, ikv, h, cell); });
        const std::vector<uint8_t> pinned = laq_pinned(p, { pos.data(), nullptr, (uint32_t) pos.size(), e.n_intact });
        std::transform(pinned.begin(), pinned.end(), res.begin() + h * n, [](uint8_t x) { return x ? 0.0f : 1.0f; });
    }
    return res;
}

static void set_inputs(const laq_cache & laq, const laq_eviction & e, const std::vector<laq_observation> & obs,
                       const std::vector<uint32_t> & dst, const fit_graph & fg) {
    const int64_t         n = fg.cells->ne[0];
    std::vector<uint32_t> cells(dst);
    std::vector<int32_t>  pos;
    for (const uint32_t cell : dst) {
        pos.push_back(laq.cells().pos_get(cell));
    }
    cells.resize(n, dst.back());
    pos.resize(n, INT32_MAX);
    ggml_backend_tensor_set(fg.cells, cells.data(), 0, ggml_nbytes(fg.cells));
    laq_set_observed(fg.slots, fg.mask, obs, pos);
    for (uint32_t ikv = 0; ikv < fg.free.size(); ++ikv) {
        const std::vector<float> free = free_of_layer(laq, e, ikv, dst, n);
        ggml_backend_tensor_set(fg.free[ikv], free.data(), 0, ggml_nbytes(fg.free[ikv]));
    }
}

void laq_cache::fit_values(const laq_eviction & e, const std::vector<laq_observation> & obs,
                           const std::vector<uint32_t> & dst) {
    if (obs.empty()) {
        return;
    }
    const int64_t        t0    = ggml_time_us();
    ggml_backend_sched_t sched = ctx->get_sched();
    llm_graph_result *   res   = ctx->get_gf_res_reserve();
    const fit_graph      fg    = build_fit_graph(*this, *res, dst.size(), dst.back() + 1, obs.size());
    if (ggml_backend_sched_alloc_graph(sched, fg.gf)) {
        set_inputs(*this, e, obs, dst, fg);
        // a layer whose values were not reached keeps them: the eviction itself is done
        if (ctx->graph_compute(fg.gf, true) != GGML_STATUS_SUCCESS) {
            LLAMA_LOG_WARN("%s: the graph was aborted or failed: not all values are fitted\n", __func__);
        }
        ggml_backend_sched_synchronize(sched);
    } else {
        LLAMA_LOG_WARN("%s: no memory: values are not fitted\n", __func__);
    }
    stats.ms_fit += (ggml_time_us() - t0) / 1000.0;
}
