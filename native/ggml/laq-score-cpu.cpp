// GGML_OP_LAQ_SCORE on the CPU
//
// Two passes over K, so that the n_q x n_kv x n_head attention is never stored:
//   1. per KV head and chunk of keys: running maximum and sum of exponentials of every query row
//   2. the logits again, turned into probabilities with the log-sum-exp of pass 1 and added up per key
// Chunks do not depend on the number of threads, so neither do the results.
//
// A tile of keys is converted to F32 and transposed, so that all lanes of a vector are keys and no horizontal sum is
// needed. What limits it: the FMAs of the two passes (half each), then the exponentials.

#include "laq-score.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

constexpr int64_t N_TILE  = 64;   // keys converted at once
constexpr int64_t N_CHUNK = 512;  // keys of one work item
constexpr int64_t N_ROWS  = 4;    // query rows of the inner kernel
constexpr int64_t N_LINE  = 16;   // floats between the buffers of two threads: a cache line

#if defined(__GNUC__) || defined(__clang__)
#    if defined(__AVX512F__)
#        define LAQ_VEC_BYTES 64
#    elif defined(__AVX__)
#        define LAQ_VEC_BYTES 32
#    else
#        define LAQ_VEC_BYTES 16
#    endif
typedef float     vec_f32 __attribute__((vector_size(LAQ_VEC_BYTES), aligned(4), may_alias));
constexpr int64_t N_LANE  = LAQ_VEC_BYTES / sizeof(float);
constexpr int64_t N_BLOCK = LAQ_VEC_BYTES == 64 ? 4 : 2;  // vectors of keys of the inner kernel
#endif

struct score_shape {
    int64_t n_embd;     // head size
    int64_t n_q;        // queries
    int64_t n_group;    // query heads of a KV head
    int64_t n_rows;     // n_q * n_group
    int64_t n_kv;       // keys
    int64_t n_head_kv;  // KV heads
    int64_t n_chunks;

    explicit score_shape(const ggml_tensor * dst) {
        const ggml_tensor * q = dst->src[0];
        const ggml_tensor * k = dst->src[1];

        n_embd    = q->ne[0];
        n_q       = q->ne[1];
        n_kv      = k->ne[1];
        n_head_kv = k->ne[2];
        n_group   = q->ne[2] / n_head_kv;
        n_rows    = n_q * n_group;
        n_chunks  = (n_kv + N_CHUNK - 1) / N_CHUNK;
    }

    // maximum and sum of each (KV head, chunk, row)
    int64_t n_stats() const { return 2 * n_head_kv * n_chunks * n_rows; }

    // transposed tile, one row of K, logits, log-sum-exp
    int64_t n_scratch() const { return n_embd * N_TILE + n_embd + (n_rows + N_ROWS) * N_TILE + n_rows + N_LINE; }
};

// scratch of one thread
struct score_work {
    float * kt;      // [n_embd][N_TILE]
    float * row;     // [n_embd]
    float * logits;  // [n_rows][N_TILE], then one row for exponentials
    float * lse;     // [n_rows]

    score_work(const score_shape & s, float * base) {
        kt     = base;
        row    = kt + s.n_embd * N_TILE;
        logits = row + s.n_embd;
        lse    = logits + (s.n_rows + N_ROWS) * N_TILE;
    }

    float * exps(const score_shape & s) const { return logits + s.n_rows * N_TILE; }
};

// one head of a cell as F32; the conversions of ggml-cpu use the vector units, those of ggml-base do not
const float * load_row(ggml_type type, const char * src, int64_t n, float * buf) {
    switch (type) {
        case GGML_TYPE_F32:  return (const float *) src;
        case GGML_TYPE_F16:  ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) src, buf, n); return buf;
        case GGML_TYPE_BF16: ggml_cpu_bf16_to_fp32((const ggml_bf16_t *) src, buf, n); return buf;
        default:             ggml_get_type_traits(type)->to_float(src, buf, n); return buf;
    }
}

// n <= N_TILE keys from i0 on, transposed; the rest of the tile is zero
void load_tile(const ggml_tensor * k, const score_shape & s, int64_t g, int64_t i0, int64_t n, const score_work & w) {
    for (int64_t t = 0; t < n; ++t) {
        const char *  src = (const char *) k->data + (i0 + t) * k->nb[1] + g * k->nb[2];
        const float * row = load_row(k->type, src, s.n_embd, w.row);
        for (int64_t c = 0; c < s.n_embd; ++c) {
            w.kt[c * N_TILE + t] = row[c];
        }
    }
    if (n < N_TILE) {
        for (int64_t c = 0; c < s.n_embd; ++c) {
            std::fill(w.kt + c * N_TILE + n, w.kt + (c + 1) * N_TILE, 0.0f);
        }
    }
}

// out[r][t] = q[r] . kt[:][t] for NR rows
template <int64_t NR> void dot_rows(const float * const * q, const float * kt, int64_t n_embd, float * out) {
#if defined(LAQ_VEC_BYTES)
    for (int64_t t0 = 0; t0 < N_TILE; t0 += N_BLOCK * N_LANE) {
        vec_f32 acc[NR][N_BLOCK] = {};
        for (int64_t c = 0; c < n_embd; ++c) {
            vec_f32 key[N_BLOCK];
            for (int64_t b = 0; b < N_BLOCK; ++b) {
                key[b] = *(const vec_f32 *) (kt + c * N_TILE + t0 + b * N_LANE);
            }
            for (int64_t r = 0; r < NR; ++r) {
                for (int64_t b = 0; b < N_BLOCK; ++b) {
                    acc[r][b] += q[r][c] * key[b];
                }
            }
        }
        for (int64_t r = 0; r < NR; ++r) {
            for (int64_t b = 0; b < N_BLOCK; ++b) {
                *(vec_f32 *) (out + r * N_TILE + t0 + b * N_LANE) = acc[r][b];
            }
        }
    }
#else
    for (int64_t r = 0; r < NR; ++r) {
        std::fill(out + r * N_TILE, out + (r + 1) * N_TILE, 0.0f);
        for (int64_t c = 0; c < n_embd; ++c) {
            for (int64_t t = 0; t < N_TILE; ++t) {
                out[r * N_TILE + t] += q[r][c] * kt[c * N_TILE + t];
            }
        }
    }
#endif
}

const float * q_row(const ggml_tensor * q, const score_shape & s, int64_t g, int64_t r) {
    return (const float *) ((const char *) q->data + (r % s.n_q) * q->nb[1] + (g * s.n_group + r / s.n_q) * q->nb[2]);
}

// w.logits[r][t] of a tile, -inf past its end
void tile_logits(const ggml_tensor * dst, const score_shape & s, int64_t g, int64_t i0, int64_t n,
                 const score_work & w) {
    const ggml_tensor * q    = dst->src[0];
    const ggml_tensor * mask = dst->src[2];

    float op_params[2];
    memcpy(op_params, dst->op_params, sizeof(op_params));
    const float scale   = op_params[0];
    const float softcap = op_params[1];

    load_tile(dst->src[1], s, g, i0, n, w);

    for (int64_t r0 = 0; r0 < s.n_rows; r0 += N_ROWS) {
        const float * rows[N_ROWS];
        for (int64_t r = 0; r < N_ROWS; ++r) {
            rows[r] = q_row(q, s, g, std::min(r0 + r, s.n_rows - 1));
        }
        dot_rows<N_ROWS>(rows, w.kt, s.n_embd, w.logits + r0 * N_TILE);
    }

    for (int64_t r = 0; r < s.n_rows; ++r) {
        float * x = w.logits + r * N_TILE;

        if (softcap == 0.0f) {
            for (int64_t t = 0; t < N_TILE; ++t) {
                x[t] *= scale;
            }
        } else {
            for (int64_t t = 0; t < n; ++t) {
                x[t] = softcap * tanhf(scale * x[t] / softcap);
            }
        }
        if (mask) {
            const float * m = (const float *) mask->data + (r % s.n_q) * s.n_kv + i0;
            for (int64_t t = 0; t < n; ++t) {
                x[t] += m[t];
            }
        }
        std::fill(x + n, x + N_TILE, -INFINITY);
    }
}

float tile_max(const float * x) {
    float lane[16];
    std::copy(x, x + 16, lane);
    for (int64_t t = 16; t < N_TILE; t += 16) {
        for (int64_t i = 0; i < 16; ++i) {
            lane[i] = lane[i] > x[t + i] ? lane[i] : x[t + i];
        }
    }
    return *std::max_element(lane, lane + 16);
}

// pass 1: stats[r] = (maximum, sum of exponentials) over one chunk
void chunk_stats(const ggml_tensor * dst, const score_shape & s, int64_t g, int64_t chunk, const score_work & w,
                 float * stats) {
    for (int64_t r = 0; r < s.n_rows; ++r) {
        stats[2 * r + 0] = -INFINITY;
        stats[2 * r + 1] = 0.0f;
    }

    const int64_t i1 = std::min(s.n_kv, (chunk + 1) * N_CHUNK);
    for (int64_t i0 = chunk * N_CHUNK; i0 < i1; i0 += N_TILE) {
        tile_logits(dst, s, g, i0, std::min(N_TILE, i1 - i0), w);

        for (int64_t r = 0; r < s.n_rows; ++r) {
            const float * x = w.logits + r * N_TILE;

            const float max_old = stats[2 * r];
            const float max_new = std::max(max_old, tile_max(x));
            if (max_new == -INFINITY) {
                continue;
            }
            const float sum  = (float) ggml_vec_soft_max_f32(N_TILE, w.exps(s), x, max_new);
            stats[2 * r + 0] = max_new;
            stats[2 * r + 1] = stats[2 * r + 1] * expf(max_old - max_new) + sum;
        }
    }
}

// log-sum-exp of every row of a KV head, over all chunks and the sink
void head_lse(const ggml_tensor * dst, const score_shape & s, int64_t g, const float * stats, float * lse) {
    const ggml_tensor * sinks = dst->src[3];

    for (int64_t r = 0; r < s.n_rows; ++r) {
        float max = sinks ? ((const float *) sinks->data)[g * s.n_group + r / s.n_q] : -INFINITY;

        double sum = sinks ? 1.0 : 0.0;
        for (int64_t c = 0; c < s.n_chunks; ++c) {
            const float * st = stats + 2 * ((g * s.n_chunks + c) * s.n_rows + r);
            if (st[0] == -INFINITY) {
                continue;
            }
            const float max_new = std::max(max, st[0]);
            sum                 = sum * exp((double) max - max_new) + st[1] * exp((double) st[0] - max_new);
            max                 = max_new;
        }
        lse[r] = max == -INFINITY ? INFINITY : max + (float) log(sum);
    }
}

// pass 2: the scores of one chunk
void chunk_scores(const ggml_tensor * dst, const score_shape & s, int64_t g, int64_t chunk, const score_work & w) {
    float * res = (float *) dst->data + g * s.n_kv;

    const int64_t i1 = std::min(s.n_kv, (chunk + 1) * N_CHUNK);
    for (int64_t i0 = chunk * N_CHUNK; i0 < i1; i0 += N_TILE) {
        const int64_t n = std::min(N_TILE, i1 - i0);
        tile_logits(dst, s, g, i0, n, w);

        float acc[N_TILE] = {};
        for (int64_t r = 0; r < s.n_rows; ++r) {
            float * p = w.exps(s);
            ggml_vec_soft_max_f32(N_TILE, p, w.logits + r * N_TILE, w.lse[r]);
            for (int64_t t = 0; t < N_TILE; ++t) {
                acc[t] += p[t];
            }
        }
        for (int64_t t = 0; t < n; ++t) {
            res[i0 + t] = acc[t] / (float) s.n_group;
        }
    }
}

}  // namespace

size_t ggml_laq_score_work_size(const ggml_tensor * dst, int n_tasks) {
    const score_shape s(dst);
    return sizeof(float) * (s.n_stats() + N_LINE + n_tasks * s.n_scratch());
}

void ggml_compute_forward_laq_score(const ggml_compute_params * params, ggml_tensor * dst) {
    const score_shape s(dst);

    GGML_ASSERT(params->wsize >= ggml_laq_score_work_size(dst, params->nth));

    float * stats = (float *) params->wdata;

    const score_work w(s, stats + s.n_stats() + N_LINE + params->ith * s.n_scratch());

    const int64_t n_items = s.n_head_kv * s.n_chunks;

    for (int64_t item = params->ith; item < n_items; item += params->nth) {
        chunk_stats(dst, s, item / s.n_chunks, item % s.n_chunks, w, stats + 2 * item * s.n_rows);
    }

    ggml_barrier(params->threadpool);

    int64_t g_lse = -1;
    for (int64_t item = params->ith; item < n_items; item += params->nth) {
        const int64_t g = item / s.n_chunks;
        if (g != g_lse) {
            head_lse(dst, s, g, stats, w.lse);
            g_lse = g;
        }
        chunk_scores(dst, s, g, item % s.n_chunks, w);
    }
}
