#pragma once

// From a shape to the kernels that run. L is what runs them, the CUDA runtime or an emulator:
//
//   size_t max_shared                           bytes of shared memory that a block can have
//   bool   mma_bf16                             the tensor cores take BF16
//   int    n_resident(kernel, threads, shared)  blocks that run at the same time
//   auto   alloc<T>(n)                          memory for as long as the object lives; .get()
//   void   launch(kernel, x, y, threads, shared, params)

#include "laq-score-kernel.cuh"

#include <algorithm>

enum class laq_key_type { F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 };

static inline void laq_set_shape(laq_score_params & p, int n_embd, int n_q, int n_head, int n_head_kv, int n_kv) {
    p.n_embd    = n_embd;
    p.n_q       = n_q;
    p.n_kv      = n_kv;
    p.n_head_kv = n_head_kv;
    p.n_group   = n_head / n_head_kv;
    p.n_rows    = n_q * p.n_group;
}

static inline void laq_set_scale(laq_score_params & p, float scale, float softcap) {
    p.q_scale = softcap == 0.0f ? scale * LAQ_LOG2E : scale / softcap;
    p.cap     = softcap * LAQ_LOG2E;
}

template <typename D> static size_t laq_shared_bytes(int nt, int n_embd) {
    const size_t rows  = D::size(nt, n_embd) * sizeof(uint4) + 8 * nt * (sizeof(float) + sizeof(int));
    const size_t stats = nt * 32 * D::WARPS * sizeof(float4);
    return rows + stats;
}

// Row tiles are 16, 32 or 64 rows. A tile costs its rows, padding included, and about 16 more for reading the keys.
// 0: not even the smallest fits.
template <typename D> static int laq_pick_nt(int n_rows, int n_embd, size_t max_shared) {
    int best      = 0;
    int best_cost = 0;
    for (const int nt : { 8, 4, 2 }) {
        const int cost = (n_rows + 8 * nt - 1) / (8 * nt) * (nt + 2);
        if (laq_shared_bytes<D>(nt, n_embd) <= max_shared && (best == 0 || cost < best_cost)) {
            best      = nt;
            best_cost = cost;
        }
    }
    return best;
}

// Into how many shares the keys of a head and row tile go: n_steps of a block in all, n_others heads and row tiles,
// n_resident blocks at a time. A block costs its steps and about one more for its queries; of equals, most blocks.
static inline int laq_shares(int n_steps, int n_others, int n_resident) {
    int     best      = 1;
    int64_t best_cost = INT64_MAX;
    for (int n = 1; n <= std::min(n_steps, 2 * n_resident / n_others + 4); ++n) {
        const int64_t n_waves = ((int64_t) n * n_others + n_resident - 1) / n_resident;
        const int64_t cost    = n_waves * ((n_steps + n - 1) / n + 1);
        if (cost <= best_cost) {
            best      = n;
            best_cost = cost;
        }
    }
    return best;
}

template <typename D, int NT, typename L> void laq_run(L & l, laq_score_params p) {
    const int    n_tiles     = laq_tiles(p.n_kv);
    const int    n_row_tiles = (p.n_rows + 8 * NT - 1) / (8 * NT);
    const int    n_threads   = 32 * D::WARPS;
    const size_t shared      = laq_shared_bytes<D>(NT, p.n_embd);

    const auto shares = [&](void (*kernel)(laq_score_params), int n_others) {
        return laq_shares((n_tiles + D::WARPS - 1) / D::WARPS, n_others, l.n_resident(kernel, n_threads, shared));
    };
    const int n_1 = shares(laq_stats_kernel<D, NT>, n_row_tiles * p.n_head_kv);
    const int n_2 = shares(laq_scores_kernel<D, NT>, p.n_head_kv);

    p.n_rows_pad = n_row_tiles * 8 * NT;
    p.n_parts    = n_1 * D::WARPS;

    const size_t n_rows = (size_t) p.n_head_kv * p.n_rows_pad;

    auto stats = l.template alloc<float2>(n_rows * p.n_parts);
    auto lse   = l.template alloc<float>(n_rows);
    auto tiles = l.template alloc<uint8_t>(n_tiles);

    p.stats = stats.get();
    p.lse   = lse.get();
    p.tiles = p.mask ? tiles.get() : nullptr;

    if (p.mask) {
        l.launch(laq_mask_kernel, (n_tiles + LAQ_MASK_WARPS - 1) / LAQ_MASK_WARPS, 1, 32 * LAQ_MASK_WARPS, 0, p);
    }
    l.launch(laq_stats_kernel<D, NT>, n_row_tiles * n_1, p.n_head_kv, n_threads, shared, p);
    l.launch(laq_merge_kernel, p.n_rows_pad, p.n_head_kv, 32, 0, p);
    l.launch(laq_scores_kernel<D, NT>, n_2, p.n_head_kv, n_threads, shared, p);
}

template <typename D, typename L> bool laq_run(L & l, const laq_score_params & p, bool dry) {
    const int nt = laq_pick_nt<D>(p.n_rows, p.n_embd, l.max_shared);
    if (dry) {
        return nt != 0;
    }
    switch (nt) {
        case 8:  laq_run<D, 8>(l, p); break;
        case 4:  laq_run<D, 4>(l, p); break;
        case 2:  laq_run<D, 2>(l, p); break;
        default: return false;
    }
    return true;
}

// false: the queries do not fit into shared memory. dry: only say so.
template <typename L> bool laq_run(L & l, laq_key_type type, const laq_score_params & p, bool dry) {
    switch (type) {
        case laq_key_type::F32: return laq_run<laq_fma<laq_wide_f32>>(l, p, dry);
        case laq_key_type::F16: return laq_run<laq_tensor<laq_f16>>(l, p, dry);
        case laq_key_type::BF16:
            return l.mma_bf16 ? laq_run<laq_tensor<laq_bf16>>(l, p, dry) : laq_run<laq_fma<laq_wide_bf16>>(l, p, dry);
        case laq_key_type::Q8_0: return laq_run<laq_tensor<laq_q8_0>>(l, p, dry);
        case laq_key_type::Q4_0: return laq_run<laq_tensor<laq_q4_0>>(l, p, dry);
        case laq_key_type::Q4_1: return laq_run<laq_tensor<laq_q4_1>>(l, p, dry);
        case laq_key_type::Q5_0: return laq_run<laq_tensor<laq_q5_0>>(l, p, dry);
        case laq_key_type::Q5_1: return laq_run<laq_tensor<laq_q5_1>>(l, p, dry);
    }
    return false;
}
