// laq-test.h: what tests and benchmarks look at.

#include "laq-test.h"

#include "laq-api.h"
#include "laq-graph-score.h"
#include "laq-policy.h"
#include "laq-score.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>

static const laq_layer & layer_at(const laq_context * laq, int32_t seq_id, uint32_t ikv) {
    laq_check_seq(laq, seq_id);
    laq_check(ikv < laq->store.layers.size(), "ikv is not a layer of the KV cache");
    return laq->store.layers[ikv];
}

// positions of the captured queries of a sequence, ascending
static std::vector<int32_t> captured_positions(const laq_context & laq, int32_t seq_id) {
    std::vector<int32_t> res;
    for (const int32_t p : laq.seqs[seq_id].ring.pos) {
        if (p >= 0) {
            res.push_back(p);
        }
    }
    std::sort(res.begin(), res.end());
    return res;
}

laq_status laq_get_layer_info(const laq_context * laq, int32_t seq_id, uint32_t ikv, laq_layer_info * info) {
    return laq_guarded([&] {
        const laq_layer & layer = layer_at(laq, seq_id, ikv);
        laq_check(info && info->size >= sizeof(uint32_t), "info is NULL or info->size is not set");

        laq_layer_info res = {};
        res.size           = info->size;
        res.il             = layer.il;
        res.n_head         = layer.n_head;
        res.n_head_kv      = layer.n_head_kv;
        res.n_embd_head_k  = layer.n_embd_head_k;
        res.n_queries      = captured_positions(*laq, seq_id).size();
        res.kq_scale       = layer.kq_scale;
        res.softcap        = layer.softcap;
        memcpy(info, &res, std::min<size_t>(info->size, sizeof(res)));
    });
}

laq_status laq_get_queries(const laq_context * laq, int32_t seq_id, uint32_t ikv, int32_t * pos, float * dst,
                           uint64_t n) {
    return laq_guarded([&] {
        const laq_layer & layer = layer_at(laq, seq_id, ikv);
        laq_check(pos && dst, "pos and dst must not be NULL");
        laq->ctx->synchronize();

        const std::vector<int32_t> held  = captured_positions(*laq, seq_id);
        const int64_t              n_row = layer.n_ring_q();
        laq_check(n == held.size() * n_row, "dst needs n_queries*n_head*n_embd_head_k elements");
        std::vector<ggml_fp16_t> row(n_row);
        for (const int32_t p : held) {
            *pos++ = p;
            ggml_backend_tensor_get(layer.ring, row.data(), laq->seqs[seq_id].ring.slot_of(p) * layer.ring->nb[1],
                                    n_row * sizeof(ggml_fp16_t));
            ggml_fp16_to_fp32_row(row.data(), dst, n_row);
            dst += n_row;
        }
    });
}

laq_status laq_get_keys(const laq_context * laq, int32_t seq_id, uint32_t ikv, float * dst, uint64_t n) {
    return laq_guarded([&] {
        const laq_layer & layer = layer_at(laq, seq_id, ikv);
        laq_check(dst, "dst must not be NULL");
        laq->ctx->synchronize();

        const ggml_tensor *         k     = laq->store.k(ikv, seq_id);
        const std::vector<uint32_t> order = laq->store.resident(seq_id);
        const uint64_t              n_row = (uint64_t) layer.n_head_kv * layer.n_embd_head_k;
        laq_check(n == order.size() * n_row, "dst needs n_resident*n_head_kv*n_embd_head_k elements");

        std::vector<uint8_t> row(k->nb[1]);
        for (const uint32_t cell : order) {
            ggml_backend_tensor_get(k, row.data(), cell * k->nb[1], row.size());
            laq_convert(k->type, row.data(), GGML_TYPE_F32, (uint8_t *) dst, n_row);
            dst += n_row;
        }
    });
}

laq_status laq_get_rows(const laq_context * laq, int32_t seq_id, uint32_t ikv, uint32_t head, bool is_v, uint8_t * dst,
                        uint64_t n) {
    return laq_guarded([&] {
        const laq_layer & layer = layer_at(laq, seq_id, ikv);
        laq_check(dst, "dst must not be NULL");
        laq_check(head < layer.n_head_kv, "head is not a KV head of the layer");
        laq->ctx->synchronize();

        const std::vector<uint32_t> order = laq->store.resident(seq_id);
        laq_host_buffer             fetched;
        const laq_cell_rows         rows(laq->store.part(ikv, is_v, seq_id), laq->store.lanes(ikv, is_v), 0,
                                         laq->store.cells(seq_id).used_max_p1(), fetched);
        laq_check(n == order.size() * rows.row_size(), "dst needs n_resident rows");
        std::vector<uint8_t> turned(rows.row_size());
        for (size_t i = 0; i < order.size(); ++i) {
            memcpy(dst + i * turned.size(), rows.row(head, order[i], turned.data()), turned.size());
        }
    });
}

laq_status laq_get_archived(laq_context * laq, int32_t seq_id, uint32_t ikv, uint32_t head, bool is_v, int32_t pos,
                            uint8_t * dst, uint64_t n, bool * held) {
    return laq_guarded([&] {
        const laq_layer & layer = layer_at(laq, seq_id, ikv);
        laq_check(laq->archive_of(seq_id) && held, "held is NULL, or there is no archive");
        laq_check(head < layer.n_head_kv, "head is not a KV head of the layer");
        laq_archive & archive = *laq->archive_of(seq_id);
        const size_t  size    = ggml_row_size((ggml_type) archive.type(is_v), layer.n_embd_head(is_v));
        laq_check(!dst || n == size, "dst needs the bytes of a row");

        *held = archive.has(pos);
        if (*held && dst) {
            std::vector<uint8_t> scratch;
            const uint8_t *      rows = archive.part(pos / laq_archive::N_BLOCK, ikv, is_v, scratch);
            *held                     = rows != nullptr;
            if (rows) {
                memcpy(dst, laq_archive::row_of(rows, head, pos, size), size);
            }
        }
    });
}

laq_status laq_get_scores(const laq_context * laq, uint32_t i_eviction, uint32_t ikv, float * dst, uint64_t n,
                          uint32_t * n_kv) {
    return laq_guarded([&] {
        const laq_layer & layer = layer_at(laq, 0, ikv);
        laq_check(n_kv, "n_kv must not be NULL");
        laq_check(laq->facts.debug, "scores are kept only if LAQ_DEBUG is set in the environment before laq_attach()");
        laq_check(i_eviction < laq->stats.n_evictions && laq->stats.n_evictions - i_eviction <= laq_context::N_DEBUG,
                  "i_eviction must be one of the last 8 of n_evictions");

        const laq_scores & scores = laq->scores[i_eviction % laq_context::N_DEBUG];
        *n_kv                     = scores.n;
        if (dst) {
            laq_check(n == layer.n_head_kv * scores.n, "dst needs n_head_kv*n_kv elements");
            std::copy_n(scores.rows.data() + layer.first_head * scores.n, n, dst);
        }
    });
}

void laq_test_fail(uint32_t n) {
    laq_faults = n;
}

//
// the score op and the selection by themselves
//

static void check_score_args(const laq_score_args & a) {
    laq_check(a.type_k >= 0 && a.type_k < GGML_TYPE_COUNT, "type_k is not a ggml_type");
    laq_check(a.n_embd_head > 0 && a.n_queries > 0 && a.n_head > 0 && a.n_head_kv > 0 && a.n_kv > 0,
              "sizes must not be 0");
    laq_check(a.n_head % a.n_head_kv == 0, "n_head must be a multiple of n_head_kv");
    laq_check(a.n_threads >= 1, "n_threads must be at least 1");
    laq_check(std::isfinite(a.scale), "scale must be finite");
    laq_check(std::isfinite(a.softcap) && a.softcap >= 0.0f, "softcap must be finite and not negative");
    laq_check(a.score_kernel >= LAQ_SCORE_KERNEL_AUTO && a.score_kernel <= LAQ_SCORE_KERNEL_COMPOSED,
              "score_kernel is not one of enum laq_score_kernel");

    const ggml_type type = (ggml_type) a.type_k;
    laq_check(type == GGML_TYPE_F32 || ggml_get_type_traits(type)->to_float, "type_k cannot be converted to F32");
    laq_check(a.n_embd_head % ggml_blck_size(type) == 0, "n_embd_head is not a multiple of type_k's block");
}

static ggml_backend_dev_t device_named(const char * name) {
    ggml_backend_dev_t dev =
        name ? ggml_backend_dev_by_name(name) : ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    laq_check(dev, "device is not the name of one of ggml's devices");
    return dev;
}

int32_t laq_device_has_kernel(uint32_t i_device, int32_t type_k, uint32_t n_embd_head) {
    if (i_device >= ggml_backend_dev_count() || type_k < 0 || type_k >= GGML_TYPE_COUNT || n_embd_head == 0 ||
        n_embd_head % ggml_blck_size((ggml_type) type_k) != 0) {
        return 0;
    }
    constexpr int64_t n_kv = 256;
    constexpr int64_t n_q  = 16;

    ggml_context_ptr ctx(ggml_init({ 8 * ggml_tensor_overhead(), nullptr, true }));
    ggml_tensor *    q    = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, n_embd_head, n_q, 2);
    ggml_tensor *    k    = ggml_new_tensor_3d(ctx.get(), (ggml_type) type_k, n_embd_head, n_kv, 1);
    ggml_tensor *    mask = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_kv, n_q);
    ggml_tensor *    op   = ggml_laq_score(ctx.get(), q, k, mask, nullptr, 1.0f, 0.0f);
    return ggml_laq_score_supported(ggml_backend_dev_get(i_device), op);
}

laq_status laq_score(const laq_score_args * args, float * dst) {
    return laq_guarded([&] {
        laq_check(args && dst && args->size == sizeof(*args), "args or dst is NULL, or args->size is wrong");
        const laq_score_args & a = *args;
        check_score_args(a);
        laq_check(a.q && a.k, "q and k must not be NULL");

        ggml_context_ptr ctx(ggml_init({ 64 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }));
        ggml_context *   c = ctx.get();

        ggml_tensor * q     = ggml_new_tensor_3d(c, GGML_TYPE_F32, a.n_embd_head, a.n_queries, a.n_head);
        ggml_tensor * cache = ggml_new_tensor_3d(c, (ggml_type) a.type_k, a.n_embd_head, a.n_head_kv, a.n_kv);
        ggml_tensor * mask  = a.mask ? ggml_new_tensor_2d(c, GGML_TYPE_F32, a.n_kv, a.n_queries) : nullptr;
        ggml_tensor * sinks = a.sinks ? ggml_new_tensor_1d(c, GGML_TYPE_F32, a.n_head) : nullptr;
        ggml_tensor * k     = ggml_permute(c, cache, 0, 2, 1, 3);

        ggml_tensor * res = ggml_laq_score(c, q, k, mask, sinks, a.scale, a.softcap);

        ggml_backend_dev_t dev   = device_named(a.device);
        const bool         fused = a.score_kernel != LAQ_SCORE_KERNEL_COMPOSED && laq_score_fused(res, dev);
        laq_check(fused || a.score_kernel != LAQ_SCORE_KERNEL_FUSED, "the device has no score kernel for this");
        if (!fused) {
            res = laq_score_composed(c, q, k, mask, sinks, a.scale, a.softcap);
        }
        ggml_cgraph * gf = ggml_new_graph(c);
        ggml_build_forward_expand(gf, res);

        ggml_backend_ptr        backend(ggml_backend_dev_init(dev, nullptr));
        ggml_backend_buffer_ptr buf(backend ? ggml_backend_alloc_ctx_tensors(c, backend.get()) : nullptr);
        if (!buf) {
            throw laq_error(LAQ_STATUS_NO_MEMORY, "no memory for the score graph");
        }
        const auto set = [](ggml_tensor * t, const void * src) {
            if (t) {
                ggml_backend_tensor_set(t, src, 0, ggml_nbytes(t));
            }
        };
        set(q, a.q);
        set(cache, a.k);
        set(mask, a.mask);
        set(sinks, a.sinks);

        laq_set_threads(backend.get(), a.n_threads);
        if (ggml_backend_graph_compute(backend.get(), gf) != GGML_STATUS_SUCCESS) {
            throw laq_error(LAQ_STATUS_COMPUTE_FAILED, "the score graph failed");
        }
        ggml_backend_tensor_get(res, dst, 0, ggml_nbytes(res));
    });
}

laq_status laq_select(const laq_params * params, const int32_t * pos, const float * scores, const uint8_t * pinned,
                      uint32_t n_kv, uint32_t * dst, uint32_t * n_kept) {
    return laq_guarded([&] {
        laq_check(params && pos && scores && pinned && dst && n_kept,
                  "params, pos, scores, pinned, dst and n_kept must not be NULL");
        const laq_params & p = *params;
        laq_check(p.size == sizeof(p), "params: size is not sizeof(struct laq_params)");
        laq_check(laq_policy_needs_queries(p), "kv_policy is not one that attends");
        laq_check(p.n_kernel % 2 == 1, "kernel_size must be odd");
        laq_check(p.pooling >= LAQ_POOLING_NONE && p.pooling <= LAQ_POOLING_AVG,
                  "pooling is not one of enum laq_pooling");
        laq_check(std::is_sorted(pos, pos + n_kv), "pos must be ascending");
        laq_check(std::none_of(scores, scores + n_kv, [](float s) { return std::isnan(s); }), "a score is NaN");
        laq_check(std::all_of(pinned, pinned + n_kv, [](uint8_t x) { return x <= 1; }), "pinned is neither 0 nor 1");

        const std::vector<uint32_t> kept = laq_select_keys(p, 0, 0, { pos, scores, n_kv, 0 }, pinned);
        std::copy(kept.begin(), kept.end(), dst);
        *n_kept = kept.size();
    });
}
