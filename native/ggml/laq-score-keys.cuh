#pragma once

// How the score kernels read keys of each type, and multiply them with the queries.
//
// A tile is 32 keys of one head against 8*NT query rows; a warp has the logits of a tile in registers, as the tensor
// cores leave them: with lane = 4 g + t, acc[m][n][2 i + j] belongs to key 16 m + 8 i + g and row 8 n + 2 t + j.
//
// Keys go from memory to registers without a stop. The sum over a chunk of 32 elements may take them in any order, so
// each lane of a quad reads what is contiguous, and the queries lie in the same order in shared memory.

#ifndef LAQ_SCORE_EMULATED
#    include "laq-score-device.cuh"
#endif

#include <cstddef>
#include <cstdint>

constexpr int LAQ_TILE  = 32;  // keys of a warp
constexpr int LAQ_CHUNK = 32;  // elements of a key: the block of the quantized types

struct laq_score_params {
    const char *  q;      // F32 [n_embd, n_q, n_head]
    const char *  k;      // [n_embd, n_kv, n_head_kv]
    const float * mask;   // [n_kv, n_q] or null
    const float * sinks;  // [n_head] or null
    float *       res;    // [n_kv, n_head_kv]

    uint8_t * tiles;  // [n_tiles] laq_tile_state, null without mask
    float2 *  stats;  // [n_head_kv][n_rows_pad][n_parts] maximum and sum of exponentials
    float *   lse;    // [n_head_kv][n_rows_pad] log-sum-exp, infinite where nothing is

    size_t nbq1, nbq2, nbk1, nbk2;  // strides in bytes
    int    row_bytes;               // of one key

    int n_embd;
    int n_q;
    int n_kv;
    int n_head_kv;
    int n_group;     // query heads of a KV head
    int n_rows;      // n_group * n_q, head by head
    int n_rows_pad;  // whole row tiles
    int n_parts;     // warps that share the keys of a head and row tile

    // logits are in units of log(2), so that exp2 is the exponential
    float q_scale;  // factor of the queries
    float cap;      // 0: no soft-cap
};

static LAQ_HOST_DEVICE int laq_chunks(int n_embd) {
    return (n_embd + LAQ_CHUNK - 1) / LAQ_CHUNK;
}

LAQ_DEVICE const float * laq_query(const laq_score_params & p, int head_kv, int row) {
    return (const float *) (p.q + (row % p.n_q) * p.nbq1 + (head_kv * p.n_group + row / p.n_q) * p.nbq2);
}

// keys 8 r + g of a tile; past the last key, that of the nearest r before it, or the last one
struct laq_key_rows {
    const char * first;
    int          r_max;

    LAQ_INLINE laq_key_rows(const laq_score_params & p, int head_kv, int key_0) {
        const int key = key_0 < p.n_kv ? key_0 : p.n_kv - 1;

        first = p.k + head_kv * p.nbk2 + key * p.nbk1;
        r_max = (p.n_kv - 1 - key) / 8;
    }

    LAQ_INLINE const char * row(const laq_score_params & p, int r) const {
        return first + (r < r_max ? r : r_max) * (8 * p.nbk1);
    }
};

//
// types: 8 elements of a chunk as four registers of two 16-bit numbers
//

struct laq_f16 {
    static constexpr bool SPLIT = false;  // lane t of a quad has elements 8t..8t+7
    static constexpr bool BF16  = false;

    using raw = uint4;

    static LAQ_INLINE raw load(const char * key, int chunk, int t, int n_embd) {
        const int e = chunk * LAQ_CHUNK + 8 * t;
        return e < n_embd ? laq_ldg((const uint4 *) (key + 2 * e)) : uint4{ 0, 0, 0, 0 };
    }

    static LAQ_INLINE uint4 unpack(const raw & x, int) { return x; }
};

struct laq_bf16 : laq_f16 {
    static constexpr bool BF16 = true;
};

// 1024 + x for four bytes x: no conversion of integers is needed
static constexpr uint32_t LAQ_F16_1024 = 0x64006400u;
static constexpr uint32_t LAQ_F16_1032 = 0x64086408u;
static constexpr uint32_t LAQ_F16_1040 = 0x64106410u;
static constexpr uint32_t LAQ_F16_1152 = 0x64806480u;
static constexpr uint32_t LAQ_F16_SIGN = 0x80008000u;

// (byte - (OFFSET - 1024)) * scale + min for the eight bytes of lo and hi
template <uint32_t OFFSET> LAQ_DEVICE uint4 laq_dequantize(uint32_t lo, uint32_t hi, uint32_t scale, uint32_t min) {
    const uint32_t magic = 0x64646464u;
    const uint32_t minus = OFFSET | LAQ_F16_SIGN;

    uint4 res;
    res.x = laq_fma_f16(laq_add_f16(laq_byte_perm(lo, magic, 0x4140), minus), scale, min);
    res.y = laq_fma_f16(laq_add_f16(laq_byte_perm(lo, magic, 0x4342), minus), scale, min);
    res.z = laq_fma_f16(laq_add_f16(laq_byte_perm(hi, magic, 0x4140), minus), scale, min);
    res.w = laq_fma_f16(laq_add_f16(laq_byte_perm(hi, magic, 0x4342), minus), scale, min);
    return res;
}

// bits 0..3 to bit 4 of each byte
LAQ_DEVICE uint32_t laq_fifth_bits(uint32_t bits) {
    return (((bits & 0xf) * 0x00204081u) & 0x01010101u) << 4;
}

LAQ_DEVICE uint32_t laq_twice(uint32_t x) {
    return x | x << 16;
}

// blocks of 18, 22 and 34 bytes are aligned to two bytes only
LAQ_DEVICE uint32_t laq_ldg_u32(const char * ptr) {
    const uint16_t * p = (const uint16_t *) ptr;
    return (uint32_t) laq_ldg(p) | (uint32_t) laq_ldg(p + 1) << 16;
}

LAQ_DEVICE uint32_t laq_ldg_u16(const char * ptr) {
    return laq_ldg((const uint16_t *) ptr);
}

struct laq_q8_0 {
    static constexpr bool SPLIT = false;
    static constexpr bool BF16  = false;

    struct raw {
        uint32_t d, lo, hi;
    };

    static LAQ_INLINE raw load(const char * key, int chunk, int t, int) {
        const char * block = key + chunk * 34;
        return { laq_ldg_u16(block), laq_ldg_u32(block + 2 + 8 * t), laq_ldg_u32(block + 6 + 8 * t) };
    }

    static LAQ_INLINE uint4 unpack(const raw & x, int) {
        // x ^ 128 = x + 128 without a sign
        return laq_dequantize<LAQ_F16_1152>(x.lo ^ 0x80808080u, x.hi ^ 0x80808080u, laq_twice(x.d), LAQ_F16_SIGN);
    }
};

struct laq_q4_0 {
    static constexpr bool SPLIT = true;  // lane t has elements 4t..4t+3 and 16+4t..16+4t+3: both halves of its bytes
    static constexpr bool BF16  = false;

    struct raw {
        uint32_t d, qs;
    };

    static LAQ_INLINE raw load(const char * key, int chunk, int t, int) {
        const char * block = key + chunk * 18;
        return { laq_ldg_u16(block), laq_ldg_u32(block + 2 + 4 * t) };
    }

    static LAQ_INLINE uint4 unpack(const raw & x, int) {
        const uint32_t lo = x.qs & 0x0f0f0f0fu;
        const uint32_t hi = (x.qs >> 4) & 0x0f0f0f0fu;
        return laq_dequantize<LAQ_F16_1032>(lo, hi, laq_twice(x.d), LAQ_F16_SIGN);
    }
};

struct laq_q4_1 {
    static constexpr bool SPLIT = true;
    static constexpr bool BF16  = false;

    struct raw {
        uint32_t dm, qs;
    };

    static LAQ_INLINE raw load(const char * key, int chunk, int t, int) {
        const uint32_t * block = (const uint32_t *) (key + chunk * 20);
        return { laq_ldg(block), laq_ldg(block + 1 + t) };
    }

    static LAQ_INLINE uint4 unpack(const raw & x, int) {
        const uint32_t lo = x.qs & 0x0f0f0f0fu;
        const uint32_t hi = (x.qs >> 4) & 0x0f0f0f0fu;
        return laq_dequantize<LAQ_F16_1024>(lo, hi, laq_twice(x.dm & 0xffff), laq_twice(x.dm >> 16));
    }
};

struct laq_q5_0 {
    static constexpr bool SPLIT = true;
    static constexpr bool BF16  = false;

    struct raw {
        uint32_t d, qh, qs;
    };

    static LAQ_INLINE raw load(const char * key, int chunk, int t, int) {
        const char * block = key + chunk * 22;
        return { laq_ldg_u16(block), laq_ldg_u32(block + 2), laq_ldg_u32(block + 6 + 4 * t) };
    }

    static LAQ_INLINE uint4 unpack(const raw & x, int t) {
        const uint32_t lo = (x.qs & 0x0f0f0f0fu) | laq_fifth_bits(x.qh >> (4 * t));
        const uint32_t hi = ((x.qs >> 4) & 0x0f0f0f0fu) | laq_fifth_bits(x.qh >> (16 + 4 * t));
        return laq_dequantize<LAQ_F16_1040>(lo, hi, laq_twice(x.d), LAQ_F16_SIGN);
    }
};

struct laq_q5_1 {
    static constexpr bool SPLIT = true;
    static constexpr bool BF16  = false;

    struct raw {
        uint32_t dm, qh, qs;
    };

    static LAQ_INLINE raw load(const char * key, int chunk, int t, int) {
        const uint32_t * block = (const uint32_t *) (key + chunk * 24);
        return { laq_ldg(block), laq_ldg(block + 1), laq_ldg(block + 2 + t) };
    }

    static LAQ_INLINE uint4 unpack(const raw & x, int t) {
        const uint32_t lo = (x.qs & 0x0f0f0f0fu) | laq_fifth_bits(x.qh >> (4 * t));
        const uint32_t hi = ((x.qs >> 4) & 0x0f0f0f0fu) | laq_fifth_bits(x.qh >> (16 + 4 * t));
        return laq_dequantize<LAQ_F16_1024>(lo, hi, laq_twice(x.dm & 0xffff), laq_twice(x.dm >> 16));
    }
};

//
// logits on the tensor cores
//

LAQ_DEVICE void laq_mma(float (&c)[4], bool bf16, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                        uint32_t b1) {
    if (bf16) {
        laq_mma_bf16_k16(c, a0, a1, a2, a3, b0, b1);
    } else if (LAQ_SM_80) {
        laq_mma_f16_k16(c, a0, a1, a2, a3, b0, b1);
    } else {
        laq_mma_f16_k8(c, a0, a1, b0);
        laq_mma_f16_k8(c, a2, a3, b1);
    }
}

// Keys of 16-bit numbers K; each query element is the sum of two such numbers, which together have about twice the bits.
// BF16 stays BF16, for its range. Scaled queries must be in the range of K, 65504 for F16.
template <typename K> struct laq_tensor {
    // of a block, and of an SM: they share the queries. At most 168 registers each; two of three compute while one waits.
    static constexpr int WARPS = 12;

    // 16-byte units of shared memory for the queries of a row tile
    static LAQ_HOST_DEVICE int size(int nt, int n_embd) { return laq_chunks(n_embd) * nt * 64; }

    static LAQ_INLINE uint32_t pack(float x, float y) { return K::BF16 ? laq_pack_bf16(x, y) : laq_pack_f16(x, y); }

    // what packing lost
    static LAQ_INLINE uint32_t rest(uint32_t packed, float x, float y) {
        const float2 kept = K::BF16 ? laq_unpack_bf16(packed) : laq_unpack_f16(packed);
        return pack(x - kept.x, y - kept.y);
    }

    static LAQ_INLINE float4 query(const laq_score_params & p, int head_kv, int row, int e) {
        if (row >= p.n_rows || e >= p.n_embd) {
            return { 0.0f, 0.0f, 0.0f, 0.0f };
        }
        const float4 x = laq_ldg((const float4 *) (laq_query(p, head_kv, row) + e));
        return { x.x * p.q_scale, x.y * p.q_scale, x.z * p.q_scale, x.w * p.q_scale };
    }

    // shared memory: [chunk][row / 8][term][row % 8][lane of the quad], 16 bytes each
    template <int NT>
    static LAQ_INLINE void stage(const laq_score_params & p, int head_kv, int row_0, int thread, uint4 * queries) {
        const int n = laq_chunks(p.n_embd) * NT * 32;
        for (int i = thread; i < n; i += 32 * WARPS) {
            const int t   = i % 4;
            const int row = row_0 + i / 4 % (8 * NT);
            const int e   = i / (32 * NT) * LAQ_CHUNK;

            const float4 x = query(p, head_kv, row, e + (K::SPLIT ? 4 * t : 8 * t));
            const float4 y = query(p, head_kv, row, e + (K::SPLIT ? 16 + 4 * t : 8 * t + 4));

            const uint4 hi = { pack(x.x, x.y), pack(x.z, x.w), pack(y.x, y.y), pack(y.z, y.w) };
            const uint4 lo = { rest(hi.x, x.x, x.y), rest(hi.y, x.z, x.w), rest(hi.z, y.x, y.y), rest(hi.w, y.z, y.w) };

            uint4 * dst = queries + i / 32 * 64 + i % 32;
            dst[0]      = hi;
            dst[32]     = lo;
        }
    }

    static LAQ_INLINE void load(const laq_score_params & p, const laq_key_rows & keys, int chunk, int t,
                                typename K::raw (&res)[4]) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            res[r] = K::load(keys.row(p, r), chunk, t, p.n_embd);
        }
    }

    // acc = K q for the keys 8 r + g of a tile, r = 0..3
    template <int NT>
    static LAQ_INLINE void dots(const laq_score_params & p, const laq_key_rows & keys, const uint4 * queries, int lane,
                                float (&acc)[2][NT][4]) {
        const int t        = lane % 4;
        const int n_chunks = laq_chunks(p.n_embd);

        // the next chunk is on its way while this one is multiplied; code for sm_75 has no registers for that
        const bool ahead = LAQ_SM_80;

        typename K::raw next[4];
        if (ahead) {
            load(p, keys, 0, t, next);
        }
#pragma unroll 1
        for (int c = 0; c < n_chunks; ++c) {
            if (!ahead) {
                load(p, keys, c, t, next);
            }
            uint4 a[4];
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                a[r] = K::unpack(next[r], t);
            }
            if (ahead && c + 1 < n_chunks) {
                load(p, keys, c + 1, t, next);
            }
            const uint4 * b = queries + c * NT * 64 + lane;
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                const uint4 hi = b[n * 64];
                const uint4 lo = b[n * 64 + 32];
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    // neighbours are independent: the sums of one half of the keys, then of the other
                    const int     m  = i % 2;
                    const uint4 & a0 = a[2 * m];
                    const uint4 & a1 = a[2 * m + 1];
                    const uint4 & x  = i < 4 ? hi : lo;
                    if (i / 2 % 2 == 0) {
                        laq_mma(acc[m][n], K::BF16, a0.x, a1.x, a0.y, a1.y, x.x, x.y);
                    } else {
                        laq_mma(acc[m][n], K::BF16, a0.z, a1.z, a0.w, a1.w, x.z, x.w);
                    }
                }
            }
        }
    }
};

//
// logits in F32, for keys of types that the tensor cores do not have
//

struct laq_wide_f32 {
    static LAQ_INLINE float4 load(const char * key, int e) { return laq_ldg((const float4 *) (key + 4 * e)); }
};

struct laq_wide_bf16 {
    static LAQ_INLINE float4 load(const char * key, int e) {
        const uint2  x  = laq_ldg((const uint2 *) (key + 2 * e));
        const float2 lo = laq_unpack_bf16(x.x);
        const float2 hi = laq_unpack_bf16(x.y);
        return { lo.x, lo.y, hi.x, hi.y };
    }
};

template <typename K> struct laq_fma {
    static constexpr int WARPS = 8;

    // rows of shared memory, in float4: rows 2t of the lanes of a quad lie in different banks
    static LAQ_HOST_DEVICE int stride(int n_embd) { return laq_chunks(n_embd) * (LAQ_CHUNK / 4) + 1; }

    static LAQ_HOST_DEVICE int size(int nt, int n_embd) { return 8 * nt * stride(n_embd); }

    template <int NT>
    static LAQ_INLINE void stage(const laq_score_params & p, int head_kv, int row_0, int thread, uint4 * queries) {
        float4 *  dst = (float4 *) queries;
        const int n4  = p.n_embd / 4;
        for (int i = thread; i < 8 * NT * n4; i += 32 * WARPS) {
            const int row = i / n4;
            const int e4  = i % n4;

            dst[row * stride(p.n_embd) + e4] = laq_tensor<laq_f16>::query(p, head_kv, row_0 + row, 4 * e4);
        }
    }

    template <int NT>
    static LAQ_INLINE void dots(const laq_score_params & p, const laq_key_rows & keys, const uint4 * queries, int lane,
                                float (&acc)[2][NT][4]) {
        const float4 * q  = (const float4 *) queries + lane % 4 * 2 * stride(p.n_embd);
        const int      n4 = p.n_embd / 4;
#pragma unroll 1
        for (int e4 = 0; e4 < n4; ++e4) {
            float4 k[4];
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                k[r] = K::load(keys.row(p, r), 4 * e4);
            }
#pragma unroll
            for (int n = 0; n < NT; ++n) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const float4 x = q[(8 * n + j) * stride(p.n_embd) + e4];
#pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        float & sum = acc[r / 2][n][r % 2 * 2 + j];
                        sum += k[r].x * x.x;
                        sum += k[r].y * x.y;
                        sum += k[r].z * x.z;
                        sum += k[r].w * x.w;
                    }
                }
            }
        }
    }
};
