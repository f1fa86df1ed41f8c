// The cases of LAQ_SCORE for test-backend-ops.cpp, which includes this in the middle of itself.

#include "laq-score.h"

// Its nodes are of GGML_OP_CUSTOM: -o LAQ_SCORE selects the cases by this name.
struct test_laq_score : public test_case {
    const ggml_type type_k;
    const int64_t   hs;  // head size
    const int64_t   n_head_kv;
    const int64_t   group;  // query heads of a KV head
    const int64_t   n_q;
    const int64_t   kv;
    const bool      mask;
    const bool      sinks;
    const float     softcap;

    ggml_tensor * result = nullptr;

    std::string op_desc(ggml_tensor * t) override { return ggml_laq_is_score(t) ? "LAQ_SCORE" : ggml_op_desc(t); }

    // The first node's result is the CPU's own: what is compared is the second one's, and that nothing else was written.
    // `perf` repeats the second node alone: on a CPU that is half of the op.
    bool run_whole_graph() override { return true; }

    std::vector<ggml_tensor *> fusion_test_nodes() override {
        std::vector<ggml_tensor *> nodes = sentinels;
        nodes.push_back(result);
        return nodes;
    }

    std::string vars() override { return VARS_TO_STR9(type_k, hs, n_head_kv, group, n_q, kv, mask, sinks, softcap); }

    // quantized keys may be rounded to F16
    double max_nmse_err() override { return ggml_is_quantized(type_k) ? 1e-6 : 1e-7; }

    // the keys are read twice
    size_t op_size(ggml_tensor * t) override {
        return 2 * ggml_row_size(type_k, hs) * n_head_kv * kv + ggml_nbytes(t) + ggml_nbytes(t->src[0]) +
               (mask ? ggml_nbytes(t->src[2]) : 0);
    }

    test_laq_score(ggml_type type_k, int64_t hs, int64_t n_head_kv, int64_t group, int64_t n_q, int64_t kv,
                   bool mask = true, bool sinks = false, float softcap = 0.0f) :
        type_k(type_k), hs(hs), n_head_kv(n_head_kv), group(group), n_q(n_q), kv(kv), mask(mask), sinks(sinks),
        softcap(softcap) {}

    ggml_tensor * build_graph(ggml_context * ctx) override {
        ggml_tensor * q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, hs, group * n_head_kv, n_q);
        ggml_set_name(q, "q");

        // a view of a KV cache with more cells
        ggml_tensor * cache = ggml_new_tensor_2d(ctx, type_k, hs * n_head_kv, kv + 5);
        ggml_set_name(cache, "cache");

        ggml_tensor * k = ggml_view_3d(ctx, cache, hs, kv, n_head_kv, cache->nb[1], ggml_row_size(type_k, hs), 0);
        ggml_set_name(k, "k");

        ggml_tensor * m = mask ? ggml_new_tensor_2d(ctx, GGML_TYPE_F32, kv, n_q) : nullptr;
        if (m) {
            ggml_set_name(m, "m");
        }
        ggml_tensor * s = sinks ? ggml_new_tensor_1d(ctx, GGML_TYPE_F32, group * n_head_kv) : nullptr;
        if (s) {
            ggml_set_name(s, "s");
        }
        const float scale = 1.0f / sqrtf((float) hs);

        result = ggml_laq_score(ctx, ggml_permute(ctx, q, 0, 2, 1, 3), k, m, s, scale, softcap);
        ggml_set_name(result, "out");

        return result;
    }

    // causal, with a few biases and cells that no query sees
    void init_mask(ggml_tensor * t) {
        std::vector<float> data(ggml_nelements(t), 0.0f);
        for (int64_t j = 0; j < n_q; ++j) {
            for (int64_t i = 0; i < kv; ++i) {
                const bool hidden = i > std::max<int64_t>(0, kv - n_q + j) || (i >= 256 && i < 330);

                data[j * kv + i] = hidden ? -INFINITY : i % 97 == 5 ? -1.5f : 0.0f;
            }
        }
        ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
    }

    void initialize_tensors(ggml_context * ctx) override {
        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
            if (strcmp(t->name, "m") == 0) {
                init_mask(t);
            } else if (t->op == GGML_OP_NONE) {
                init_tensor_uniform(t, -2.0f, 2.0f);
            }
        }
    }
};

static const ggml_type laq_key_types[] = { GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16, GGML_TYPE_Q8_0,
                                           GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1 };

static void laq_score_eval_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    for (const ggml_type type : laq_key_types) {
        for (const int64_t hs : { 32, 64, 80, 96, 112, 128, 192, 256, 576 }) {
            if (hs % ggml_blck_size(type) == 0) {
                cases.emplace_back(new test_laq_score(type, hs, 2, 4, 16, 700));
                cases.emplace_back(new test_laq_score(type, hs, 1, 7, 5, 333, true, true, 20.0f));
            }
        }
        for (const int64_t kv : { 1, 31, 32, 33, 1024, 1025 }) {
            cases.emplace_back(new test_laq_score(type, 128, 3, 3, 8, kv));
        }
        for (const int64_t n_q : { 1, 2, 8, 24, 64, 128 }) {
            cases.emplace_back(new test_laq_score(type, 64, 2, 4, n_q, 500));
            cases.emplace_back(new test_laq_score(type, 64, 2, 1, n_q, 500, false, n_q > 8));
        }
    }
    cases.emplace_back(new test_laq_score(GGML_TYPE_F16, 128, 8, 4, 16, 32768));
    cases.emplace_back(new test_laq_score(GGML_TYPE_F16, 576, 1, 128, 16, 1000));
}

static void laq_score_perf_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    // what the memory can do, to compare with: a copy, contiguous and larger than any cache of the device
    cases.emplace_back(new test_cpy(GGML_TYPE_F32, GGML_TYPE_F32, { 1 << 26, 1, 1, 1 }));
    for (const ggml_type type : laq_key_types) {
        for (const int64_t kv : { 4096, 32768, 131072 }) {
            cases.emplace_back(new test_laq_score(type, 128, 8, 4, 16, kv));
        }
    }
    for (const int64_t n_q : { 1, 4, 8, 24, 32, 64, 128 }) {
        cases.emplace_back(new test_laq_score(GGML_TYPE_F16, 128, 8, 4, n_q, 32768));
    }
    cases.emplace_back(new test_laq_score(GGML_TYPE_F16, 64, 8, 4, 16, 32768));
    cases.emplace_back(new test_laq_score(GGML_TYPE_F16, 256, 4, 2, 16, 32768));
    cases.emplace_back(new test_laq_score(GGML_TYPE_F16, 576, 1, 128, 16, 32768));
}
