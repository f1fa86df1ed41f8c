// LAQ_SCORE on Metal
//
// K is read twice, and n_q x n_kv x n_head logits are never stored:
//   kernel_laq_score_queries  scaled queries, the rows of a KV head one after the other, zeros up to whole blocks
//   kernel_laq_score_stats_*  per chunk of keys: maximum and sum of exponentials of every row
//   kernel_laq_score_merge    log-sum-exp of every row, over the chunks and the sink
//   kernel_laq_score_sum_*    the logits again, turned into probabilities and added up per key
//
// A thread group owns one chunk of one KV head. A tile of keys lies in its memory as F32; a SIMD group takes a block of
// 8 rows against the tile, or against a part of it if there are fewer blocks than SIMD groups. Chunks depend on the
// number of keys alone, so that results do not depend on the device.
//
// Fast math: no infinities in here. A hidden key has the logit LAQ_HIDDEN. It adds to the sum of a row that has seen
// nothing else, and then drops out: exp(LAQ_HIDDEN - maximum) is 0. The last pass leaves it out.

// this part is read by the host, too

#define LAQ_SCORE_NSG 4   // SIMD groups of a thread group
#define LAQ_SCORE_NR  8   // rows of a block
#define LAQ_SCORE_PAD 8   // floats after each key of the tile: no two of 4 keys in one bank
#define LAQ_SCORE_LDX 36  // floats of a row of logits: 32 keys, and lanes of different rows in different banks

#ifndef __METAL_VERSION__
#    include <stdint.h>
#else
#    include <metal_stdlib>
using namespace metal;
#endif

typedef struct {
    int32_t  n_embd;      // head size
    int32_t  n_q;         // queries
    int32_t  n_group;     // query heads of a KV head
    int32_t  n_rows;      // n_q*n_group
    int32_t  n_rows_pad;  // whole blocks
    int32_t  n_kv;        // keys
    int32_t  n_tile;      // keys of a tile: 8, 16 or 32
    int32_t  n_split;     // parts of a tile, each for another SIMD group: 1, 2 or 4
    int32_t  n_chunk;     // keys of a thread group, whole tiles
    int32_t  n_chunks;
    int32_t  has_mask;
    int32_t  has_sinks;
    float    scale;       // of the queries; with a soft-cap: scale/softcap
    float    softcap;
    uint64_t nbq1;
    uint64_t nbq2;
    uint64_t nbk1;
    uint64_t nbk2;
} ggml_metal_kargs_laq_score;

#ifdef __METAL_VERSION__

constant float LAQ_HIDDEN = -1.0e38f;

//
// 16 elements of a row of K
//

inline void laq_load_f32(device const char * row, int c, threadgroup float4 * dst) {
    device const float4 * src = (device const float4 *) row + 4*c;
    for (short i = 0; i < 4; ++i) {
        dst[i] = src[i];
    }
}

inline void laq_load_f16(device const char * row, int c, threadgroup float4 * dst) {
    device const half4 * src = (device const half4 *) row + 4*c;
    for (short i = 0; i < 4; ++i) {
        dst[i] = float4(src[i]);
    }
}

// by its bits: not every compiler has bfloat
inline void laq_load_bf16(device const char * row, int c, threadgroup float4 * dst) {
    device const ushort4 * src = (device const ushort4 *) row + 4*c;
    for (short i = 0; i < 4; ++i) {
        const ushort4 x = src[i];

        dst[i] = float4(as_type<float>((uint) x.x << 16), as_type<float>((uint) x.y << 16),
                        as_type<float>((uint) x.z << 16), as_type<float>((uint) x.w << 16));
    }
}

inline void laq_load_q8_0(device const char * row, int c, threadgroup float4 * dst) {
    device const char   * block = row + 34*(c/2);
    device const ushort * qs    = (device const ushort *) (block + 2 + 16*(c%2));

    const float d = *(device const half *) block;
    for (short i = 0; i < 4; ++i) {
        const ushort a = qs[2*i];
        const ushort b = qs[2*i + 1];

        dst[i] = d*float4((float) (int8_t) (a & 0xff), (float) (int8_t) (a >> 8),
                          (float) (int8_t) (b & 0xff), (float) (int8_t) (b >> 8));
    }
}

// d*x + m of 4 bits and, from qh, a fifth. The first half of a block is in the lower 4 bits of its bytes.
inline void laq_unpack(device const ushort * qs, uint qh, short upper, float d, float m, threadgroup float4 * dst) {
    qh >>= 16*upper;
    for (short i = 0; i < 4; ++i) {
        const uint w = (((uint) qs[2*i] | (uint) qs[2*i + 1] << 16) >> 4*upper) & 0x0f0f0f0f;

        const uint x0 = (w       & 0xff) | ((qh << 4) & 16);
        const uint x1 = (w >>  8 & 0xff) | ((qh << 3) & 16);
        const uint x2 = (w >> 16 & 0xff) | ((qh << 2) & 16);
        const uint x3 = (w >> 24       ) | ((qh << 1) & 16);

        dst[i] = d*float4((float) x0, (float) x1, (float) x2, (float) x3) + m;
        qh >>= 4;
    }
}

inline void laq_load_q4_0(device const char * row, int c, threadgroup float4 * dst) {
    device const char * block = row + 18*(c/2);

    const float d = *(device const half *) block;
    laq_unpack((device const ushort *) (block + 2), 0, c%2, d, -8.0f*d, dst);
}

inline void laq_load_q4_1(device const char * row, int c, threadgroup float4 * dst) {
    device const char * block = row + 20*(c/2);

    const float d = ((device const half *) block)[0];
    const float m = ((device const half *) block)[1];
    laq_unpack((device const ushort *) (block + 4), 0, c%2, d, m, dst);
}

inline void laq_load_q5_0(device const char * row, int c, threadgroup float4 * dst) {
    device const char   * block = row + 22*(c/2);
    device const ushort * qh    = (device const ushort *) (block + 2);

    const float d = *(device const half *) block;
    laq_unpack(qh + 2, (uint) qh[0] | (uint) qh[1] << 16, c%2, d, -16.0f*d, dst);
}

inline void laq_load_q5_1(device const char * row, int c, threadgroup float4 * dst) {
    device const char   * block = row + 24*(c/2);
    device const ushort * qh    = (device const ushort *) (block + 4);

    const float d = ((device const half *) block)[0];
    const float m = ((device const half *) block)[1];
    laq_unpack(qh + 2, (uint) qh[0] | (uint) qh[1] << 16, c%2, d, m, dst);
}

//
// queries and log-sum-exp
//

// one SIMD group per row and KV head
kernel void kernel_laq_score_queries(
        constant ggml_metal_kargs_laq_score & args,
        device const char  * q,
        device       float * qs,
        uint3  tgpig[[threadgroup_position_in_grid]],
        ushort tiisg[[thread_index_in_simdgroup]]) {
    const int r = tgpig.x;
    const int g = tgpig.y;

    q += (r%args.n_q)*args.nbq1 + (g*args.n_group + r/args.n_q)*args.nbq2;

    device const float * src = (device const float *) q;
    device       float * dst = qs + ((uint64_t) g*args.n_rows_pad + r)*args.n_embd;

    for (int c = tiisg; c < args.n_embd; c += 32) {
        dst[c] = r < args.n_rows ? args.scale*src[c] : 0.0f;
    }
}

// one SIMD group per row and KV head
kernel void kernel_laq_score_merge(
        constant ggml_metal_kargs_laq_score & args,
        device const float2 * stats,
        device const float  * sinks,
        device       float  * lse,
        uint3  tgpig[[threadgroup_position_in_grid]],
        ushort tiisg[[thread_index_in_simdgroup]]) {
    const int r = tgpig.x;
    const int g = tgpig.y;

    const int n_parts = args.n_chunks*args.n_split;

    float top = LAQ_HIDDEN;
    float sum = 0.0f;
    for (int p = tiisg; p < n_parts; p += 32) {
        const float2 st = stats[((uint64_t) g*n_parts + p)*args.n_rows_pad + r];

        const float top_new = max(top, st.x);

        sum = sum*exp(top - top_new) + st.y*exp(st.x - top_new);
        top = top_new;
    }
    const float top_all = simd_max(top);

    sum = simd_sum(sum*exp(top - top_all));
    top = top_all;

    if (args.has_sinks && r < args.n_rows) {
        const float sink    = max(sinks[g*args.n_group + r/args.n_q], LAQ_HIDDEN);
        const float top_new = max(top, sink);

        sum = sum*exp(top - top_new) + exp(sink - top_new);
        top = top_new;
    }
    if (tiisg == 0) {
        // of a row that is none the probabilities become 0
        lse[g*args.n_rows_pad + r] = r < args.n_rows ? top + log(sum) : -LAQ_HIDDEN;
    }
}

//
// a block of 8 rows against 8*KM keys
//

// logits, without soft-cap and mask, to sx
template <short KM>
void laq_block_dot(
        constant ggml_metal_kargs_laq_score & args,
        device      const float * q,
        threadgroup const float * sk,
        threadgroup       float * sx) {
    const int n_embd = args.n_embd;
    const int ldk    = n_embd + LAQ_SCORE_PAD;

    simdgroup_float8x8 acc[KM];
    #pragma unroll
    for (short t = 0; t < KM; ++t) {
        acc[t] = make_filled_simdgroup_matrix<float, 8>(0.0f);
    }
    for (int c = 0; c < n_embd; c += 8) {
        simdgroup_float8x8 mq;
        simdgroup_load(mq, q + c, n_embd, 0, false);

        #pragma unroll
        for (short t = 0; t < KM; ++t) {
            simdgroup_float8x8 mk;
            simdgroup_load(mk, sk + 8*t*ldk + c, ldk, 0, true);
            simdgroup_multiply_accumulate(acc[t], mq, mk, acc[t]);
        }
    }
    // the lanes are done with the block before
    simdgroup_barrier(mem_flags::mem_threadgroup);
    #pragma unroll
    for (short t = 0; t < KM; ++t) {
        simdgroup_store(acc[t], sx + 8*t, LAQ_SCORE_LDX, 0, false);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
}

// mask: of the row
inline float laq_logit(constant ggml_metal_kargs_laq_score & args, device const float * mask, float x, int i) {
    if (i >= args.n_kv) {
        return LAQ_HIDDEN;
    }
    if (args.softcap != 0.0f) {
        x = args.softcap*precise::tanh(x);
    }
    if (args.has_mask) {
        x += mask[i];
    }
    return max(x, LAQ_HIDDEN);
}

// maximum and sum of exponentials joined to those of the rows, stats [8]; 4 lanes a row
template <short KM>
void laq_block_stats(
        constant ggml_metal_kargs_laq_score & args,
        device      const float  * mask,
        threadgroup const float  * sx,
        device            float2 * stats,
        int    r0,
        int    i0,
        bool   first,
        ushort tiisg) {
    const short r   = tiisg/4;
    const short sub = tiisg%4;

    device const float * mr = mask + (uint64_t) ((r0 + r)%args.n_q)*args.n_kv;

    float x[2*KM];
    float top = LAQ_HIDDEN;
    #pragma unroll
    for (short t = 0; t < 2*KM; ++t) {
        x[t] = laq_logit(args, mr, sx[r*LAQ_SCORE_LDX + 4*t + sub], i0 + 4*t + sub);
        top  = max(top, x[t]);
    }
    top = max(top, simd_shuffle_xor(top, 1));
    top = max(top, simd_shuffle_xor(top, 2));

    float sum = 0.0f;
    #pragma unroll
    for (short t = 0; t < 2*KM; ++t) {
        sum += exp(x[t] - top);
    }
    sum += simd_shuffle_xor(sum, 1);
    sum += simd_shuffle_xor(sum, 2);

    // no other thread comes to these statistics before the merge
    if (sub == 0) {
        float2 old = float2(LAQ_HIDDEN, 0.0f);
        if (!first) {
            old = stats[r];
        }
        const float top_new = max(old.x, top);

        stats[r] = float2(top_new, old.y*exp(old.x - top_new) + sum*exp(top - top_new));
    }
}

// probabilities of one key, over the rows of this lane; 32/(8*KM) lanes a key
template <short KM>
float laq_block_sum(
        constant ggml_metal_kargs_laq_score & args,
        device      const float * mask,
        threadgroup const float * sx,
        device      const float * lse,
        int    r0,
        int    i0,
        ushort tiisg) {
    constexpr short NK   = 8*KM;
    constexpr short STEP = 32/NK;

    const short t = tiisg%NK;

    int   j   = (r0 + tiisg/NK)%args.n_q;
    float sum = 0.0f;
    #pragma unroll
    for (short n = 0; n < LAQ_SCORE_NR; n += STEP) {
        const short r = tiisg/NK + n;
        const float x = laq_logit(args, mask + (uint64_t) j*args.n_kv, sx[r*LAQ_SCORE_LDX + t], i0 + t);

        sum += x > LAQ_HIDDEN ? exp(x - lse[r]) : 0.0f;

        j += STEP;
        while (j >= args.n_q) {
            j -= args.n_q;
        }
    }
    return sum;
}

//
// the two passes
//

template <void (*load)(device const char *, int, threadgroup float4 *)>
void laq_load_tile(
        constant ggml_metal_kargs_laq_score & args,
        device const char  * k,
        threadgroup  float * sk,
        int    i0,
        ushort tiitg) {
    const int n16 = args.n_embd/16;

    for (int u = tiitg; u < args.n_tile*n16; u += 32*LAQ_SCORE_NSG) {
        const int t = u/n16;
        const int c = u%n16;

        threadgroup float4 * dst = (threadgroup float4 *) (sk + t*(args.n_embd + LAQ_SCORE_PAD) + 16*c);
        if (i0 + t < args.n_kv) {
            load(k + (i0 + t)*args.nbk1, c, dst);
        } else {
            for (short i = 0; i < 4; ++i) {
                dst[i] = float4(0.0f);
            }
        }
    }
}

// what the SIMD groups have of each key -> dst
inline void laq_reduce_tile(
        constant ggml_metal_kargs_laq_score & args,
        threadgroup const float * red,
        device            float * dst,
        int    i0,
        ushort tiitg) {
    if (tiitg >= args.n_tile || i0 + tiitg >= args.n_kv) {
        return;
    }
    const int n_part = args.n_tile/args.n_split; // keys of a SIMD group

    float sum = 0.0f;
    for (int sg = tiitg/n_part; sg < LAQ_SCORE_NSG; sg += args.n_split) {
        for (int l = tiitg%n_part; l < 32; l += n_part) {
            sum += red[32*sg + l];
        }
    }
    dst[i0 + tiitg] = sum/args.n_group;
}

template <void (*load)(device const char *, int, threadgroup float4 *), bool SUM, short KM>
void laq_chunk(
        constant ggml_metal_kargs_laq_score & args,
        device const float  * qs,
        device const char   * k,
        device const float  * mask,
        device       float2 * stats,
        device const float  * lse,
        device       float  * dst,
        threadgroup  float  * smem,
        int    chunk,
        ushort tiitg,
        ushort tiisg,
        ushort sgitg) {
    threadgroup float * sk  = smem;
    threadgroup float * sx  = sk + args.n_tile*(args.n_embd + LAQ_SCORE_PAD) + sgitg*LAQ_SCORE_NR*LAQ_SCORE_LDX;
    threadgroup float * red = sk + args.n_tile*(args.n_embd + LAQ_SCORE_PAD) + LAQ_SCORE_NSG*LAQ_SCORE_NR*LAQ_SCORE_LDX;

    const int part  = sgitg%args.n_split;
    const int start = chunk*args.n_chunk;
    const int end   = min(start + args.n_chunk, args.n_kv);

    stats += (uint64_t) (chunk*args.n_split + part)*args.n_rows_pad;

    for (int i0 = start; i0 < end; i0 += args.n_tile) {
        laq_load_tile<load>(args, k, sk, i0, tiitg);

        threadgroup_barrier(mem_flags::mem_threadgroup);

        threadgroup const float * skp = sk + part*8*KM*(args.n_embd + LAQ_SCORE_PAD);

        float sum = 0.0f;
        for (int b = sgitg/args.n_split; b < args.n_rows_pad/LAQ_SCORE_NR; b += LAQ_SCORE_NSG/args.n_split) {
            const int r0 = b*LAQ_SCORE_NR;

            laq_block_dot<KM>(args, qs + (uint64_t) r0*args.n_embd, skp, sx);
            if (SUM) {
                sum += laq_block_sum<KM>(args, mask, sx, lse + r0, r0, i0 + part*8*KM, tiisg);
            } else {
                laq_block_stats<KM>(args, mask, sx, stats + r0, r0, i0 + part*8*KM, i0 == start, tiisg);
            }
        }
        if (SUM) {
            red[tiitg] = sum;
        }

        threadgroup_barrier(mem_flags::mem_threadgroup);

        if (SUM) {
            laq_reduce_tile(args, red, dst, i0, tiitg);
        }
    }
}

template <void (*load)(device const char *, int, threadgroup float4 *), bool SUM>
kernel void kernel_laq_score(
        constant ggml_metal_kargs_laq_score & args,
        device const float  * qs,
        device const char   * k,
        device const float  * mask,
        device       float2 * stats,
        device const float  * lse,
        device       float  * dst,
        threadgroup  float  * smem [[threadgroup(0)]],
        uint3  tgpig[[threadgroup_position_in_grid]],
        ushort tiitg[[thread_index_in_threadgroup]],
        ushort tiisg[[thread_index_in_simdgroup]],
        ushort sgitg[[simdgroup_index_in_threadgroup]]) {
    const int g = tgpig.y;

    qs    += (uint64_t) g*args.n_rows_pad*args.n_embd;
    k     += g*args.nbk2;
    stats += (uint64_t) g*args.n_chunks*args.n_split*args.n_rows_pad;
    lse   += g*args.n_rows_pad;
    dst   += (uint64_t) g*args.n_kv;

    switch (args.n_tile/args.n_split) {
        case 32: laq_chunk<load, SUM, 4>(args, qs, k, mask, stats, lse, dst, smem, tgpig.x, tiitg, tiisg, sgitg); break;
        case 16: laq_chunk<load, SUM, 2>(args, qs, k, mask, stats, lse, dst, smem, tgpig.x, tiitg, tiisg, sgitg); break;
        default: laq_chunk<load, SUM, 1>(args, qs, k, mask, stats, lse, dst, smem, tgpig.x, tiitg, tiisg, sgitg); break;
    }
}

typedef decltype(kernel_laq_score<laq_load_f32, false>) kernel_laq_score_t;

template [[host_name("kernel_laq_score_stats_f32")]]  kernel kernel_laq_score_t kernel_laq_score<laq_load_f32,  false>;
template [[host_name("kernel_laq_score_stats_f16")]]  kernel kernel_laq_score_t kernel_laq_score<laq_load_f16,  false>;
template [[host_name("kernel_laq_score_stats_bf16")]] kernel kernel_laq_score_t kernel_laq_score<laq_load_bf16, false>;
template [[host_name("kernel_laq_score_stats_q8_0")]] kernel kernel_laq_score_t kernel_laq_score<laq_load_q8_0, false>;
template [[host_name("kernel_laq_score_stats_q4_0")]] kernel kernel_laq_score_t kernel_laq_score<laq_load_q4_0, false>;
template [[host_name("kernel_laq_score_stats_q4_1")]] kernel kernel_laq_score_t kernel_laq_score<laq_load_q4_1, false>;
template [[host_name("kernel_laq_score_stats_q5_0")]] kernel kernel_laq_score_t kernel_laq_score<laq_load_q5_0, false>;
template [[host_name("kernel_laq_score_stats_q5_1")]] kernel kernel_laq_score_t kernel_laq_score<laq_load_q5_1, false>;

template [[host_name("kernel_laq_score_sum_f32")]]  kernel kernel_laq_score_t kernel_laq_score<laq_load_f32,  true>;
template [[host_name("kernel_laq_score_sum_f16")]]  kernel kernel_laq_score_t kernel_laq_score<laq_load_f16,  true>;
template [[host_name("kernel_laq_score_sum_bf16")]] kernel kernel_laq_score_t kernel_laq_score<laq_load_bf16, true>;
template [[host_name("kernel_laq_score_sum_q8_0")]] kernel kernel_laq_score_t kernel_laq_score<laq_load_q8_0, true>;
template [[host_name("kernel_laq_score_sum_q4_0")]] kernel kernel_laq_score_t kernel_laq_score<laq_load_q4_0, true>;
template [[host_name("kernel_laq_score_sum_q4_1")]] kernel kernel_laq_score_t kernel_laq_score<laq_load_q4_1, true>;
template [[host_name("kernel_laq_score_sum_q5_0")]] kernel kernel_laq_score_t kernel_laq_score<laq_load_q5_0, true>;
template [[host_name("kernel_laq_score_sum_q5_1")]] kernel kernel_laq_score_t kernel_laq_score<laq_load_q5_1, true>;

#endif
