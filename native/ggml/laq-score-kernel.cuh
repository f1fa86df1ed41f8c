#pragma once

// The kernels of LAQ_SCORE, in the order in which they run:
//
//   laq_mask_kernel    which tiles of keys the mask leaves alone, or hides
//   laq_stats_kernel   pass 1 over K: maximum and sum of exponentials of each query row, one pair per warp
//   laq_merge_kernel   the pairs and the sinks become the log-sum-exp of each row
//   laq_scores_kernel  pass 2 over K: the logits again, as probabilities, added up per key
//
// A warp takes whole tiles (see laq-score-keys.cuh); only the staging of queries needs the block. Sums are made in an
// order that depends on the shape and the device alone: no atomics.

#include "laq-score-keys.cuh"

#include <cmath>

constexpr int LAQ_MASK_WARPS = 4;  // of a block

constexpr float LAQ_LOG2E  = 1.4426950408889634f;
constexpr float LAQ_LOWEST = -1e30f;  // finite: -inf - -inf is no number

enum laq_tile_state : uint8_t {
    LAQ_TILE_PLAIN,   // the mask is zero
    LAQ_TILE_MASKED,  // it is to be added
    LAQ_TILE_HIDDEN,  // no query sees a key of it
};

static LAQ_HOST_DEVICE int laq_tiles(int n_kv) {
    return (n_kv + LAQ_TILE - 1) / LAQ_TILE;
}

static __global__ void __launch_bounds__(32 * LAQ_MASK_WARPS) laq_mask_kernel(const laq_score_params p) {
    const int lane = threadIdx.x % 32;
    const int tile = blockIdx.x * LAQ_MASK_WARPS + threadIdx.x / 32;
    const int key  = tile * LAQ_TILE + lane;

    bool masked  = false;
    bool visible = false;
    if (key < p.n_kv) {
#pragma unroll 4
        for (int j = 0; j < p.n_q; ++j) {
            const float x = laq_ldg(p.mask + (size_t) j * p.n_kv + key);

            masked  = masked || x != 0.0f;
            visible = visible || x != -INFINITY;
        }
    }
    masked  = laq_any(masked);
    visible = laq_any(visible);
    if (lane == 0 && tile < laq_tiles(p.n_kv)) {
        p.tiles[tile] = !visible ? LAQ_TILE_HIDDEN : masked ? LAQ_TILE_MASKED : LAQ_TILE_PLAIN;
    }
}

LAQ_DEVICE laq_tile_state laq_state(const laq_score_params & p, int tile) {
    return p.tiles ? (laq_tile_state) laq_ldg(p.tiles + tile) : LAQ_TILE_PLAIN;
}

LAQ_DEVICE void laq_prefetch_tile(const laq_score_params & p, int head_kv, int tile, int lane) {
    const int key = tile * LAQ_TILE + lane;
    if (tile < 0 || key >= p.n_kv || laq_state(p, tile) == LAQ_TILE_HIDDEN) {
        return;
    }
    const char * row = p.k + head_kv * p.nbk2 + key * p.nbk1;
    for (const char * line = row - (uintptr_t) row % 64; line < row + p.row_bytes; line += 64) {
        laq_prefetch(line);
    }
}

LAQ_DEVICE float laq_tanh(float x) {
    // no difference of large numbers, no overflow that is not 1
    return 1.0f - laq_div(2.0f, laq_exp2(2.0f * LAQ_LOG2E * x) + 1.0f);
}

// what a block knows of its row tile, in shared memory
template <typename D, int NT> struct laq_rows {
    uint4 * queries;
    float * lse;    // of a row
    int *   query;  // which row of the mask belongs to it

    LAQ_INLINE laq_rows(const laq_score_params & p, uint4 * shared) {
        queries = shared;
        lse     = (float *) (shared + D::size(NT, p.n_embd));
        query   = (int *) (lse + 8 * NT);
    }

    LAQ_INLINE void stage(const laq_score_params & p, int head_kv, int row_0, bool with_lse) {
        D::template stage<NT>(p, head_kv, row_0, threadIdx.x, queries);
        if (threadIdx.x < 8 * NT) {
            const int row      = row_0 + threadIdx.x;
            query[threadIdx.x] = row % p.n_q;
            if (with_lse) {
                lse[threadIdx.x] = laq_ldg(p.lse + (size_t) head_kv * p.n_rows_pad + row);
            }
        }
    }
};

// past the last key it adds what belongs to others: laq_logits overwrites it
template <int NT>
LAQ_DEVICE void laq_apply_mask(const laq_score_params & p, int tile, int lane, const int * query,
                               float (&acc)[2][NT][4]) {
    int key[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        key[r] = tile * LAQ_TILE + 8 * r + lane / 4;
        key[r] = key[r] < p.n_kv ? key[r] : p.n_kv - 1;
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        laq_sync_warp();  // not all loads at once: there are no registers for them
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const float * x = p.mask + (size_t) query[8 * n + lane % 4 * 2 + j] * p.n_kv;
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                acc[r / 2][n][r % 2 * 2 + j] += LAQ_LOG2E * laq_ldg(x + key[r]);
            }
        }
    }
}

// logits of a tile in units of log(2), -inf past the last key
template <typename D, int NT>
LAQ_DEVICE void laq_logits(const laq_score_params & p, int head_kv, int tile, int lane, const laq_rows<D, NT> & rows,
                           float (&acc)[2][NT][4]) {
    const laq_key_rows keys(p, head_kv, tile * LAQ_TILE + lane / 4);
#pragma unroll
    for (int i = 0; i < 8 * NT; ++i) {
        acc[i / (4 * NT)][i / 4 % NT][i % 4] = 0.0f;
    }
    D::template dots<NT>(p, keys, rows.queries, lane, acc);

    if (p.cap != 0.0f) {
#pragma unroll
        for (int i = 0; i < 8 * NT; ++i) {
            float & x = acc[i / (4 * NT)][i / 4 % NT][i % 4];
            x         = p.cap * laq_tanh(x);
        }
    }
    if (laq_state(p, tile) == LAQ_TILE_MASKED) {
        laq_apply_mask<NT>(p, tile, lane, rows.query, acc);
    }
    if ((tile + 1) * LAQ_TILE > p.n_kv) {
#pragma unroll
        for (int i = 0; i < 8 * NT; ++i) {
            const int key = tile * LAQ_TILE + i / (4 * NT) * 16 + i % 4 / 2 * 8 + lane / 4;
            if (key >= p.n_kv) {
                acc[i / (4 * NT)][i / 4 % NT][i % 4] = -INFINITY;
            }
        }
    }
}

// (max, sum) of a row, and another pair of the same row
LAQ_DEVICE void laq_merge(float & max, float & sum, float max_2, float sum_2) {
    const float top = fmaxf(max, max_2);

    sum = sum * laq_exp2(max - top) + sum_2 * laq_exp2(max_2 - top);
    max = top;
}

// the same with the pair of the lane whose number differs in one bit
LAQ_DEVICE void laq_merge_lanes(float & max, float & sum, int bit) {
    const float max_2 = laq_shfl_xor(max, bit);
    const float sum_2 = laq_shfl_xor(sum, bit);
    laq_merge(max, sum, max_2, sum_2);
}

// (max, sum) of a row, and four more logits
LAQ_DEVICE void laq_add(float & max, float & sum, float x0, float x1, float x2, float x3) {
    const float top = fmaxf(max, fmaxf(fmaxf(x0, x1), fmaxf(x2, x3)));

    sum = sum * laq_exp2(max - top) +
          ((laq_exp2(x0 - top) + laq_exp2(x1 - top)) + (laq_exp2(x2 - top) + laq_exp2(x3 - top)));
    max = top;
}

// grid: row tiles * shares of the keys, KV heads. Blocks of one share of the keys start together, so that what one of
// them read from memory, the others find in the L2 cache.
template <typename D, int NT>
static __global__ void __launch_bounds__(32 * D::WARPS, 1) laq_stats_kernel(const laq_score_params p) {
    LAQ_SHARED(shared);
    laq_rows<D, NT> rows(p, shared);

    const int lane    = threadIdx.x % 32;
    const int head_kv = blockIdx.y;
    const int row_0   = blockIdx.x % (p.n_rows_pad / (8 * NT)) * 8 * NT;
    const int part    = blockIdx.x / (p.n_rows_pad / (8 * NT)) * D::WARPS + threadIdx.x / 32;

    rows.stage(p, head_kv, row_0, false);
    laq_sync_block();

    // of the rows of a thread: two maxima, two sums. The registers are taken by the logits.
    float4 * stats = (float4 *) (rows.query + 8 * NT) + threadIdx.x;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        stats[n * 32 * D::WARPS] = { LAQ_LOWEST, LAQ_LOWEST, 0.0f, 0.0f };
    }
#pragma unroll 1
    for (int tile = part; tile < laq_tiles(p.n_kv); tile += p.n_parts) {
        laq_prefetch_tile(p, head_kv, tile + p.n_parts, lane);
        if (laq_state(p, tile) == LAQ_TILE_HIDDEN) {
            continue;
        }
        float acc[2][NT][4];
        laq_logits<D, NT>(p, head_kv, tile, lane, rows, acc);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            float4 x = stats[n * 32 * D::WARPS];
            laq_add(x.x, x.z, acc[0][n][0], acc[0][n][2], acc[1][n][0], acc[1][n][2]);
            laq_add(x.y, x.w, acc[0][n][1], acc[0][n][3], acc[1][n][1], acc[1][n][3]);
            stats[n * 32 * D::WARPS] = x;
        }
    }
#pragma unroll 1
    for (int n = 0; n < NT; ++n) {
        float4 x = stats[n * 32 * D::WARPS];
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) {
            laq_merge_lanes(x.x, x.z, offset);
            laq_merge_lanes(x.y, x.w, offset);
        }
        if (lane < 4) {
            float2 * dst = p.stats + ((size_t) head_kv * p.n_rows_pad + row_0 + 8 * n + 2 * lane) * p.n_parts + part;

            dst[0]         = { x.x, x.z };
            dst[p.n_parts] = { x.y, x.w };
        }
    }
}

// grid: rows, KV heads; one warp
static __global__ void __launch_bounds__(32) laq_merge_kernel(const laq_score_params p) {
    const int    row = blockIdx.x;
    const size_t i   = (size_t) blockIdx.y * p.n_rows_pad + row;

    float max = LAQ_LOWEST;
    float sum = 0.0f;
    for (int part = threadIdx.x; part < p.n_parts; part += 32) {
        const float2 x = laq_ldg(p.stats + i * p.n_parts + part);
        laq_merge(max, sum, x.x, x.y);
    }
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        laq_merge_lanes(max, sum, offset);
    }
    if (p.sinks && row < p.n_rows) {
        laq_merge(max, sum, LAQ_LOG2E * laq_ldg(p.sinks + blockIdx.y * p.n_group + row / p.n_q), 1.0f);
    }
    if (threadIdx.x == 0) {
        p.lse[i] = row < p.n_rows && sum > 0.0f ? max + laq_log2(sum) : INFINITY;
    }
}

// adds the rows of a tile up; the first row tile begins the result, others are added to it
template <typename D, int NT>
LAQ_DEVICE void laq_score_tile(const laq_score_params & p, int head_kv, int tile, int row_0, int lane,
                               const laq_rows<D, NT> & rows) {
    float sum[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
    if (laq_state(p, tile) != LAQ_TILE_HIDDEN) {
        float acc[2][NT][4];
        laq_logits<D, NT>(p, head_kv, tile, lane, rows, acc);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const float2 shift = *(const float2 *) (rows.lse + 8 * n + lane % 4 * 2);
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                sum[r] +=
                    laq_exp2(acc[r / 2][n][r % 2 * 2] - shift.x) + laq_exp2(acc[r / 2][n][r % 2 * 2 + 1] - shift.y);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        sum[r] += laq_shfl_xor(sum[r], 1);
        sum[r] += laq_shfl_xor(sum[r], 2);
    }
    // each lane of a quad writes one of its four keys
    const int   t   = lane % 4;
    const int   key = tile * LAQ_TILE + 8 * t + lane / 4;
    const float x   = (t == 0 ? sum[0] : t == 1 ? sum[1] : t == 2 ? sum[2] : sum[3]) / (float) p.n_group;
    if (key < p.n_kv) {
        float * res = p.res + (size_t) head_kv * p.n_kv + key;
        *res        = row_0 == 0 ? x : *res + x;
    }
}

// grid: shares of the keys, KV heads
template <typename D, int NT>
static __global__ void __launch_bounds__(32 * D::WARPS, 1) laq_scores_kernel(const laq_score_params p) {
    LAQ_SHARED(shared);
    laq_rows<D, NT> rows(p, shared);

    const int  lane    = threadIdx.x % 32;
    const int  head_kv = blockIdx.y;
    const int  n_tiles = laq_tiles(p.n_kv);
    const bool many    = p.n_rows_pad > 8 * NT;
    // tiles of a warp for each time that the queries of a row tile are staged
    const int n_each = many ? 2 : 1;
    const int n_step = D::WARPS * n_each;

    bool staged = false;
#pragma unroll 1
    for (int i_0 = blockIdx.x * n_step; i_0 < n_tiles; i_0 += gridDim.x * n_step) {
#pragma unroll 1
        for (int row_0 = 0; row_0 < p.n_rows_pad; row_0 += 8 * NT) {
            if (many || !staged) {
                laq_sync_block();
                rows.stage(p, head_kv, row_0, true);
                laq_sync_block();
                staged = true;
            }
#pragma unroll 1
            for (int i = i_0 + threadIdx.x / 32; i < i_0 + n_step && i < n_tiles; i += D::WARPS) {
                // backwards: what pass 1 read last may still be in the L2 cache
                const int tile = n_tiles - 1 - i;
                if (row_0 == 0) {
                    laq_prefetch_tile(p, head_kv, tile - gridDim.x * n_step, lane);
                }
                laq_score_tile<D, NT>(p, head_kv, tile, row_0, lane, rows);
            }
        }
    }
}
