// laq-test.h : what tests and benchmarks look at; programs need laq.h alone
#ifndef LAQ_TEST_H
#define LAQ_TEST_H

#include "laq.h"

#ifdef __cplusplus
extern "C" {
#endif

// LAQ_CDEF_BEGIN

struct laq_layer_info {
    uint32_t size;
    int32_t  il;  // layer of the model
    uint32_t n_head;
    uint32_t n_head_kv;
    uint32_t n_embd_head_k;
    uint32_t n_queries;  // captured queries of the sequence
    float    kq_scale;
    float    softcap;  // 0 = none
};

enum laq_status laq_get_layer_info(const struct laq_context * laq, int32_t seq_id, uint32_t ikv,
                                   struct laq_layer_info * info);

// captured queries of a sequence in a layer, oldest first: pos [n_queries], dst F32 [n_queries][n_head][n_embd_head_k]
enum laq_status laq_get_queries(const struct laq_context * laq, int32_t seq_id, uint32_t ikv, int32_t * pos,
                                float * dst, uint64_t n);

// resident keys of a sequence in a layer as F32, in the order of laq_kept_positions: dst
// [n_resident][n_head_kv][n_embd_head_k]
enum laq_status laq_get_keys(const struct laq_context * laq, int32_t seq_id, uint32_t ikv, float * dst, uint64_t n);

// rows of K or V of a sequence in a layer and KV head, as they are stored and in the order of laq_kept_positions:
// dst [n_resident][bytes of a row]
enum laq_status laq_get_rows(const struct laq_context * laq, int32_t seq_id, uint32_t ikv, uint32_t head, bool is_v,
                             uint8_t * dst, uint64_t n);

// *held: whether a position is archived; then dst [n] receives its row of K or V as the archive stores it, if not NULL
enum laq_status laq_get_archived(struct laq_context * laq, int32_t seq_id, uint32_t ikv, uint32_t head, bool is_v,
                                 int32_t pos, uint8_t * dst, uint64_t n, bool * held);

// Scores (before pooling) of one of the last 8 evictions, i_eviction of n_evictions: dst F32 [n_head_kv][n_kv]; *n_kv
// receives the length, dst may be NULL. An eviction has a column for each token that was resident, in order of
// position, probe and pseudo tokens included. A recall has one for each position, 0 where there was no token. Kept only
// if LAQ_DEBUG is set in the
// environment before laq_attach().
enum laq_status laq_get_scores(const struct laq_context * laq, uint32_t i_eviction, uint32_t ikv, float * dst,
                               uint64_t n, uint32_t * n_kv);

// what computes scores
enum laq_score_kernel {
    LAQ_SCORE_KERNEL_AUTO     = 0,  // fused where the device has it
    LAQ_SCORE_KERNEL_FUSED    = 1,
    LAQ_SCORE_KERNEL_COMPOSED = 2,  // mul_mat, soft_max_ext, sum_rows
};

struct laq_score_args {
    uint32_t      size;
    int32_t       type_k;       // enum ggml_type
    uint32_t      n_embd_head;  // d
    uint32_t      n_queries;
    uint32_t      n_head;
    uint32_t      n_head_kv;
    uint32_t      n_kv;
    int32_t       score_kernel;  // enum laq_score_kernel
    int32_t       n_threads;
    float         scale;
    float         softcap;
    const float * q;       // [n_head][n_queries][d]
    const void *  k;       // rows of type_k: [n_kv][n_head_kv][d]
    const float * mask;    // [n_queries][n_kv] added to the scaled logits, or NULL
    const float * sinks;   // [n_head], or NULL
    const char *  device;  // as ggml_backend_dev_name() has it; NULL = the CPU
};

// The score op alone: dst F32 [n_head_kv][n_kv], the mean over the heads of a group of the
// attention that the queries pay to each key, summed over the queries.
enum laq_status laq_score(const struct laq_score_args * args, float * dst);

// The selection alone, of keys sorted by position: indices of the kept ones, ascending, dst [min(n_kv, n_kv_budget)];
// *n_kept receives the count. pinned [n_kv] (0 or 1) is kept first, then by rank; equal ranks: the lower index wins.
// Of params, the policy (one that attends), n_kv_budget, pooling, n_kernel and n_follow are used.
enum laq_status laq_select(const struct laq_params * params, const int32_t * pos, const float * scores,
                           const uint8_t * pinned, uint32_t n_kv, uint32_t * dst, uint32_t * n_kept);

struct laq_chunk {
    uint32_t n_tokens;  // decode so many next; 0 = there is no room, and none can be made
    uint32_t n_evict;   // evict so many first
    uint32_t n_probe;   // scored by so many of the prompt's last tokens
};

// How a prompt goes on, without doing it: n_used cells of n_cells are in use, n_resident of them by the sequence
// itself, n_left tokens of the prompt are not decoded yet. Of params, the policy, n_kv_budget, n_lookahead, n_probe and
// n_chunk (here 0 = n_batch) are used.
struct laq_chunk laq_plan_chunk(const struct laq_params * params, uint32_t n_cells, uint32_t n_used,
                                uint32_t n_resident, uint32_t n_left, uint32_t n_batch);

// score of the RANDOM policy: the same on every machine, in [0, 1)
float laq_random_score(uint32_t seed, uint32_t ikv, uint32_t head, int32_t pos);

// Let the n-th allocation from now on fail in this thread, of those inside laq_* calls and evictions; 0 = none fails.
void laq_test_fail(uint32_t n);

// LAQ_CDEF_END

#ifdef __cplusplus
}
#endif

#endif  // LAQ_TEST_H
