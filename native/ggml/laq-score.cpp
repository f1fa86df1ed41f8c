#include "laq-score.h"

#include "ggml-impl.h"
#include "laq-score-impl.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>

//
// the CPU's kernel
//

static std::mutex                        cpu_mutex;
static ggml_laq_score_cpu *              cpu_kernels = nullptr;
static std::atomic<ggml_laq_score_cpu *> cpu_best{ nullptr };

// ggml_backend_load_all() uses the variant of ggml-cpu with the highest rank. It loads the others to ask for theirs, and
// whether the system unloads them afterwards is its choice.
static void find_best() {
    ggml_laq_score_cpu * best = nullptr;
    for (ggml_laq_score_cpu * kernel = cpu_kernels; kernel; kernel = kernel->next) {
        if (kernel->rank > (best ? best->rank : 0)) {
            best = kernel;
        }
    }
    cpu_best = best;
}

void ggml_laq_score_cpu_add(ggml_laq_score_cpu * kernel) {
    const std::lock_guard<std::mutex> lock(cpu_mutex);
    kernel->next = cpu_kernels;
    cpu_kernels  = kernel;
    find_best();
}

void ggml_laq_score_cpu_remove(ggml_laq_score_cpu * kernel) {
    const std::lock_guard<std::mutex> lock(cpu_mutex);
    for (ggml_laq_score_cpu ** at = &cpu_kernels; *at; at = &(*at)->next) {
        if (*at == kernel) {
            *at = kernel->next;
            break;
        }
    }
    find_best();
}

static const ggml_laq_score_cpu & cpu_kernel() {
    const ggml_laq_score_cpu * kernel = cpu_best;
    GGML_ASSERT(kernel && "no ggml-cpu for this machine is loaded");
    return *kernel;
}

//
// the two nodes; the addresses of these functions say what a node is
//

static void compute_work(ggml_tensor * dst, int ith, int nth, void *) {
    cpu_kernel().compute_work(dst, ith, nth);
}

static void compute_score(ggml_tensor * dst, int ith, int nth, void *) {
    cpu_kernel().compute_score(dst, ith, nth);
}

static bool is_node_of(const ggml_tensor * node, ggml_custom_op_t fun) {
    if (node->op != GGML_OP_CUSTOM) {
        return false;
    }
    ggml_custom_op_params params;
    memcpy(&params, node->op_params, sizeof(params));
    return params.fun == fun;
}

bool ggml_laq_is_score(const ggml_tensor * node) {
    return is_node_of(node, compute_score);
}

bool ggml_laq_is_score_work(const ggml_tensor * node) {
    return is_node_of(node, compute_work);
}

//
// the constructor
//

static void check_args(const ggml_tensor * q, const ggml_tensor * k, const ggml_tensor * mask,
                       const ggml_tensor * sinks) {
    GGML_ASSERT(q->type == GGML_TYPE_F32);
    GGML_ASSERT(q->ne[0] == k->ne[0]);
    GGML_ASSERT(q->ne[2] % k->ne[2] == 0);
    GGML_ASSERT(q->ne[3] == 1 && k->ne[3] == 1);
    GGML_ASSERT(q->nb[0] == ggml_type_size(q->type));
    GGML_ASSERT(k->nb[0] == ggml_type_size(k->type));

    if (mask) {
        GGML_ASSERT(mask->type == GGML_TYPE_F32);
        GGML_ASSERT(ggml_is_contiguous(mask));
        GGML_ASSERT(mask->ne[0] == k->ne[1] && mask->ne[1] == q->ne[1]);
    }
    if (sinks) {
        GGML_ASSERT(sinks->type == GGML_TYPE_F32);
        GGML_ASSERT(ggml_is_contiguous(sinks));
        GGML_ASSERT(sinks->ne[0] == q->ne[2]);
    }
}

// Floats of the first node. For each KV head and chunk of keys it has the maximum and the sum of every row, and as many
// chunks as fit have their logits, too.
static int64_t work_size(const ggml_tensor * q, const ggml_tensor * k) {
    constexpr int64_t N_LANES = 16;           // rows are padded to a vector: at most 64 bytes
    constexpr int64_t N_KEPT  = 1024 * 1024;  // floats of logits, at most

    const int64_t n_head_kv = k->ne[2];
    const int64_t n_chunks  = (k->ne[1] + GGML_LAQ_SCORE_CHUNK - 1) / GGML_LAQ_SCORE_CHUNK;
    const int64_t n_items   = n_head_kv * n_chunks;
    const int64_t n_lanes   = GGML_PAD(q->ne[1] * q->ne[2] / n_head_kv, N_LANES);
    const int64_t n_logits  = GGML_LAQ_SCORE_CHUNK * n_lanes;

    return n_items * 2 * n_lanes + std::min(n_items, N_KEPT / n_logits) * n_logits;
}

static void set_params(ggml_tensor * node, float scale, float softcap) {
    static_assert((GGML_LAQ_SCORE_PARAMS + 2) * sizeof(float) <= GGML_MAX_OP_PARAMS, "op_params are too small");
    ggml_set_op_params_f32(node, GGML_LAQ_SCORE_PARAMS, scale);
    ggml_set_op_params_f32(node, GGML_LAQ_SCORE_PARAMS + 1, softcap);
}

ggml_tensor * ggml_laq_score(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * mask,
                             ggml_tensor * sinks, float scale, float softcap) {
    check_args(q, k, mask, sinks);

    ggml_tensor * src[5] = { q, k, mask, sinks, nullptr };

    ggml_tensor * work =
        ggml_custom_4d(ctx, GGML_TYPE_F32, work_size(q, k), 1, 1, 1, src, 3, compute_work, GGML_N_TASKS_MAX, nullptr);
    set_params(work, scale, softcap);
    src[4] = work;

    ggml_tensor * score =
        ggml_custom_4d(ctx, GGML_TYPE_F32, k->ne[1], k->ne[2], 1, 1, src, 5, compute_score, GGML_N_TASKS_MAX, nullptr);
    set_params(score, scale, softcap);
    return score;
}

ggml_tensor * ggml_laq_score_work(const ggml_tensor * score) {
    GGML_ASSERT(ggml_laq_is_score(score));
    return score->src[4];
}

//
// devices
//

bool ggml_laq_score_supported(ggml_backend_dev_t dev, const ggml_tensor * score) {
    GGML_ASSERT(ggml_laq_is_score(score));

    const ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(dev);
    if (!reg) {
        return false;  // several devices as one
    }
    const char * name = ggml_backend_reg_name(reg);
    if (strcmp(name, "CPU") != 0 && strcmp(name, "CUDA") != 0 && strcmp(name, "MTL") != 0) {
        return false;
    }
    return ggml_backend_dev_supports_op(dev, score) && ggml_backend_dev_supports_op(dev, ggml_laq_score_work(score));
}
