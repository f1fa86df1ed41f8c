#include "laq-cuda.h"
#include "laq-score-impl.h"
#include "laq-score-launch.cuh"

#include "ggml-cuda/common.cuh"

#include <climits>

// what laq_run needs
struct laq_cuda {
    size_t max_shared;
    bool   mma_bf16;
    int    n_sm = 0;

    ggml_backend_cuda_context * ctx = nullptr;

    explicit laq_cuda(int device) {
        const auto & info = ggml_cuda_info().devices[device];

        max_shared = info.smpbo;
        mma_bf16   = ampere_mma_available(info.cc);
        n_sm       = info.nsm;
    }

    int n_resident(void (*kernel)(laq_score_params), int threads, size_t shared) const {
        CUDA_CHECK(
            cudaFuncSetAttribute((const void *) kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int) shared));
        int n_blocks = 0;
        CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n_blocks, kernel, threads, shared));
        GGML_ASSERT(n_blocks > 0);
        return n_sm * n_blocks;
    }

    template <typename T> ggml_cuda_pool_alloc<T> alloc(size_t n) const {
        return ggml_cuda_pool_alloc<T>(ctx->pool(), n);
    }

    void launch(void (*kernel)(laq_score_params), int x, int y, int threads, size_t shared,
                const laq_score_params & p) const {
        kernel<<<dim3(x, y), threads, shared, ctx->stream()>>>(p);
        CUDA_CHECK(cudaGetLastError());
    }
};

static bool key_type(ggml_type type, laq_key_type & res) {
    switch (type) {
        case GGML_TYPE_F32:  res = laq_key_type::F32; return true;
        case GGML_TYPE_F16:  res = laq_key_type::F16; return true;
        case GGML_TYPE_BF16: res = laq_key_type::BF16; return true;
        case GGML_TYPE_Q8_0: res = laq_key_type::Q8_0; return true;
        case GGML_TYPE_Q4_0: res = laq_key_type::Q4_0; return true;
        case GGML_TYPE_Q4_1: res = laq_key_type::Q4_1; return true;
        case GGML_TYPE_Q5_0: res = laq_key_type::Q5_0; return true;
        case GGML_TYPE_Q5_1: res = laq_key_type::Q5_1; return true;
        default:             return false;
    }
}

// shape, strides and scale of either node
static laq_score_params op_params(const ggml_tensor * op) {
    const ggml_tensor * q = op->src[0];
    const ggml_tensor * k = op->src[1];

    laq_score_params p = {};
    laq_set_shape(p, q->ne[0], q->ne[1], q->ne[2], k->ne[2], k->ne[1]);

    laq_set_scale(p, ggml_laq_score_scale(op), ggml_laq_score_softcap(op));

    p.nbq1      = q->nb[1];
    p.nbq2      = q->nb[2];
    p.nbk1      = k->nb[1];
    p.nbk2      = k->nb[2];
    p.row_bytes = ggml_row_size(k->type, k->ne[0]);
    return p;
}

// rows that can be read 16 bytes at a time, wherever they begin
static bool rows_are_aligned(const ggml_tensor * t) {
    return t->nb[1] % 16 == 0 && t->nb[2] % 16 == 0 && t->view_offs % 16 == 0;
}

// Both nodes have q and k. The first one is supported where the second one is, so that they are on one device.
bool ggml_cuda_laq_supported(int device, const ggml_tensor * node) {
    if (!ggml_laq_is_score(node) && !ggml_laq_is_score_work(node)) {
        return false;
    }
    const ggml_tensor * q = node->src[0];
    const ggml_tensor * k = node->src[1];

    laq_key_type type;
    if (!turing_mma_available(ggml_cuda_info().devices[device].cc) || !key_type(k->type, type)) {
        return false;
    }
    if (k->ne[0] % 16 != 0 || !rows_are_aligned(q) || (!ggml_is_quantized(k->type) && !rows_are_aligned(k))) {
        return false;
    }
    // counts are int, with room for rounding up; KV heads are a dimension of the grid
    if (k->ne[1] > INT_MAX / 2 || q->ne[1] * q->ne[2] > INT_MAX / 2 || k->ne[2] > 65535) {
        return false;
    }
    laq_cuda cuda(device);
    return laq_run(cuda, type, op_params(node), true);
}

static void compute_score(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    laq_score_params p = op_params(dst);

    p.q     = (const char *) dst->src[0]->data;
    p.k     = (const char *) dst->src[1]->data;
    p.mask  = dst->src[2] ? (const float *) dst->src[2]->data : nullptr;
    p.sinks = dst->src[3] ? (const float *) dst->src[3]->data : nullptr;
    p.res   = (float *) dst->data;

    laq_key_type type  = laq_key_type::F32;
    const bool   known = key_type(dst->src[1]->type, type);
    GGML_ASSERT(known);

    laq_cuda cuda(ctx.device);
    cuda.ctx        = &ctx;
    const bool fits = laq_run(cuda, type, p, false);
    GGML_ASSERT(fits);
}

// the kernels of the second node do all the work, in memory of the pool
bool ggml_cuda_laq_compute(ggml_backend_cuda_context & ctx, ggml_tensor * node) {
    if (ggml_laq_is_score_work(node)) {
        return true;
    }
    if (!ggml_laq_is_score(node)) {
        return false;
    }
    compute_score(ctx, node);
    return true;
}
