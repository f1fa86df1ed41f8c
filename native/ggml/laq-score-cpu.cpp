// LAQ_SCORE on the CPU
//
// Two passes over K, so that the n_q x n_kv x n_head attention need not be stored. Each is a node of the graph:
//   1. per KV head and chunk of keys: running maximum and sum of exponentials of every query row
//   2. the logits again, turned into probabilities with the log-sum-exp of pass 1 and added up per key
// The first node's result has the maxima and sums and, as far as it has room, the logits of the first chunks. Pass 2
// computes the other logits anew, alike to the bit. Chunks do not depend on the number of threads, so neither do the
// results.
//
// The lanes of a vector are query rows: K is read as it lies, only the few queries are transposed, and what belongs to a
// row (maximum, sum) stays in its lane. What limits it: the FMAs of the two passes (half each), then the exponentials.

#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "laq-score-impl.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#ifdef LAQ_CPU_VARIANTS
// this variant of ggml-cpu: 0 = not for this machine
extern "C" int ggml_backend_score(void);
#endif

namespace {

constexpr int64_t N_TILE  = 32;                    // keys converted at once
constexpr int64_t N_CHUNK = GGML_LAQ_SCORE_CHUNK;  // keys of one work item
constexpr int64_t N_ALIGN = 16;                    // floats of the widest vector

#if defined(__GNUC__) || defined(__clang__)
#    if defined(__AVX512F__)
#        define LAQ_VEC_BYTES 64
#    elif defined(__AVX__)
#        define LAQ_VEC_BYTES 32
#    else
#        define LAQ_VEC_BYTES 16
#    endif
typedef float     vec_f32 __attribute__((vector_size(LAQ_VEC_BYTES), aligned(4), may_alias));
constexpr int64_t N_LANE = LAQ_VEC_BYTES / sizeof(float);
// the inner kernel: N_KEYS keys against N_BLOCK vectors of rows, all sums in registers
constexpr int64_t N_KEYS  = LAQ_VEC_BYTES == 64 ? 8 : 4;
constexpr int64_t N_BLOCK = LAQ_VEC_BYTES == 64 ? 3 : 2;
#else
// compilers without vector types: the same with arrays of a fixed length
constexpr int64_t N_LANE  = 8;
constexpr int64_t N_KEYS  = 4;
constexpr int64_t N_BLOCK = 1;

struct vec_f32 {
    float x[N_LANE];

    vec_f32 & operator+=(const vec_f32 & o) {
        for (int64_t i = 0; i < N_LANE; ++i) {
            x[i] += o.x[i];
        }
        return *this;
    }

    friend vec_f32 operator*(float a, vec_f32 v) {
        for (float & y : v.x) {
            y *= a;
        }
        return v;
    }
};
#endif

static_assert(N_TILE % N_KEYS == 0, "a tile is made of whole blocks of keys");

struct score_shape {
    int64_t n_embd;     // head size
    int64_t n_q;        // queries
    int64_t n_group;    // query heads of a KV head
    int64_t n_rows;     // n_q * n_group
    int64_t n_lanes;    // n_rows, rounded up to whole vectors
    int64_t n_kv;       // keys
    int64_t n_head_kv;  // KV heads
    int64_t n_chunks;   // of a KV head
    int64_t n_items;    // chunks of all KV heads

    // of either node
    explicit score_shape(const ggml_tensor * dst) {
        const ggml_tensor * q = dst->src[0];
        const ggml_tensor * k = dst->src[1];

        n_embd    = q->ne[0];
        n_q       = q->ne[1];
        n_kv      = k->ne[1];
        n_head_kv = k->ne[2];
        n_group   = q->ne[2] / n_head_kv;
        n_rows    = n_q * n_group;
        n_lanes   = GGML_PAD(n_rows, N_LANE);
        n_chunks  = (n_kv + N_CHUNK - 1) / N_CHUNK;
        n_items   = n_head_kv * n_chunks;
    }
};

// what the first node leaves for the second one
struct score_parts {
    int64_t n_logits;  // of a chunk
    int64_t n_kept;    // chunks whose logits are there
    float * stats;     // [n_items][2][n_lanes], maximum and sum
    float * logits;    // [n_kept][N_CHUNK][n_lanes]

    score_parts(const score_shape & s, const ggml_tensor * work) {
        const int64_t n_stats = s.n_items * 2 * s.n_lanes;
        GGML_ASSERT(work->ne[0] >= n_stats);

        n_logits = N_CHUNK * s.n_lanes;
        n_kept   = std::min(s.n_items, (work->ne[0] - n_stats) / n_logits);
        stats    = (float *) work->data;
        logits   = stats + n_stats;
    }

    // logits of an item, null: they are not kept
    float * kept(int64_t item) const { return item < n_kept ? logits + item * n_logits : nullptr; }
};

// scratch of one thread
struct score_scratch {
    float * qt;      // [n_embd][n_lanes] of one KV head, rows past n_rows are zero
    float * keys;    // [N_TILE][n_embd]
    float * logits;  // [N_TILE][n_lanes], where they are not kept
    float * exps;    // [N_TILE][n_lanes]
    float * lse;     // [n_lanes]

    explicit score_scratch(const score_shape & s) {
        const int64_t n = s.n_embd * (s.n_lanes + N_TILE) + 2 * N_TILE * s.n_lanes + s.n_lanes;
        memory.reset(new (std::nothrow) float[n + N_ALIGN]);
        GGML_ASSERT(memory && "no memory for scores");

        const uintptr_t begin = (uintptr_t) memory.get();
        qt                    = (float *) GGML_PAD(begin, N_ALIGN * sizeof(float));
        keys                  = qt + s.n_embd * s.n_lanes;
        logits                = keys + s.n_embd * N_TILE;
        exps                  = logits + N_TILE * s.n_lanes;
        lse                   = exps + N_TILE * s.n_lanes;
    }

  private:
    std::unique_ptr<float[]> memory;
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

void load_queries(const ggml_tensor * q, const score_shape & s, int64_t g, const score_scratch & w) {
    std::fill(w.qt, w.qt + s.n_embd * s.n_lanes, 0.0f);
    for (int64_t r = 0; r < s.n_rows; ++r) {
        const float * row =
            (const float *) ((const char *) q->data + (r % s.n_q) * q->nb[1] + (g * s.n_group + r / s.n_q) * q->nb[2]);
        for (int64_t c = 0; c < s.n_embd; ++c) {
            w.qt[c * s.n_lanes + r] = row[c];
        }
    }
}

// out[t][r] = k[t] . q[r] for N_KEYS keys and NB vectors of rows
template <int64_t NB>
void dot_block(const float * const * k, const float * qt, int64_t n_embd, int64_t n_lanes, float * out) {
    vec_f32 acc[N_KEYS][NB] = {};
    for (int64_t c = 0; c < n_embd; ++c) {
        vec_f32 q[NB];
        for (int64_t b = 0; b < NB; ++b) {
            q[b] = *(const vec_f32 *) (qt + c * n_lanes + b * N_LANE);
        }
        for (int64_t t = 0; t < N_KEYS; ++t) {
            for (int64_t b = 0; b < NB; ++b) {
                acc[t][b] += k[t][c] * q[b];
            }
        }
    }
    for (int64_t t = 0; t < N_KEYS; ++t) {
        for (int64_t b = 0; b < NB; ++b) {
            *(vec_f32 *) (out + t * n_lanes + b * N_LANE) = acc[t][b];
        }
    }
}

// fn(number of vectors, first row) for all rows: as many vectors at once as sums are held in registers
template <typename F> void each_block(int64_t n_lanes, F fn) {
    constexpr int64_t N = N_BLOCK * N_LANE;
    int64_t           r = 0;
    for (; r + N <= n_lanes; r += N) {
        fn(std::integral_constant<int64_t, N_BLOCK>(), r);
    }
    for (; r < n_lanes; r += N_LANE) {
        fn(std::integral_constant<int64_t, 1>(), r);
    }
}

void dot_tile(const float * const * k, const score_shape & s, const float * qt, float * out) {
    for (int64_t t = 0; t < N_TILE; t += N_KEYS) {
        each_block(s.n_lanes, [&](auto n, int64_t r) {
            dot_block<decltype(n)::value>(k + t, qt + r, s.n_embd, s.n_lanes, out + t * s.n_lanes + r);
        });
    }
}

// Whether the mask hides or shifts anything in a tile. Most keys are older than all queries: nothing there.
bool has_mask(const float * m, const score_shape & s, int64_t n) {
    uint32_t bits = 0;
    for (int64_t j = 0; j < s.n_q; ++j) {
        for (int64_t t = 0; t < n; ++t) {
            uint32_t x;
            memcpy(&x, m + j * s.n_kv + t, sizeof(x));
            bits |= x << 1;  // -0.0 is nothing, too
        }
    }
    return bits != 0;
}

// x[t][r] = logits of a tile, -inf past its end
void tile_logits(const ggml_tensor * dst, const score_shape & s, int64_t g, int64_t i0, int64_t n,
                 const score_scratch & w, float * x) {
    const ggml_tensor * k    = dst->src[1];
    const ggml_tensor * mask = dst->src[2];

    const float scale   = ggml_laq_score_scale(dst);
    const float softcap = ggml_laq_score_softcap(dst);

    const float * keys[N_TILE];
    for (int64_t t = 0; t < n; ++t) {
        const char * src = (const char *) k->data + (i0 + t) * k->nb[1] + g * k->nb[2];
        keys[t]          = load_row(k->type, src, s.n_embd, w.keys + t * s.n_embd);
    }
    std::fill(keys + n, keys + N_TILE, keys[0]);

    dot_tile(keys, s, w.qt, x);

    if (softcap == 0.0f) {
        ggml_vec_scale_f32(N_TILE * s.n_lanes, x, scale);
    } else {
        for (int64_t i = 0; i < N_TILE * s.n_lanes; ++i) {
            x[i] = softcap * tanhf(scale * x[i] / softcap);
        }
    }
    const float * m = mask ? (const float *) mask->data + i0 : nullptr;
    if (m && has_mask(m, s, n)) {
        for (int64_t t = 0; t < n; ++t) {
            for (int64_t r = 0; r < s.n_rows; ++r) {
                x[t * s.n_lanes + r] += m[(r % s.n_q) * s.n_kv + t];
            }
        }
    }
    std::fill(x + n * s.n_lanes, x + N_TILE * s.n_lanes, -INFINITY);
}

// w.exps[t][r] = exp(x[t][r] - shift[r])
void tile_exps(const score_shape & s, const float * x, const float * shift, const score_scratch & w) {
    for (int64_t t = 0; t < N_TILE; ++t) {
        for (int64_t r = 0; r < s.n_lanes; ++r) {
            w.exps[t * s.n_lanes + r] = x[t * s.n_lanes + r] - shift[r];
        }
    }
    ggml_vec_soft_max_f32(N_TILE * s.n_lanes, w.exps, w.exps, 0.0f);
}

// where the logits of the tile from key i0 on are: among those of its chunk that are kept, or where kept is null in the
// scratch
float * logits_of(const score_shape & s, const score_scratch & w, float * kept, int64_t i0) {
    return kept ? kept + i0 % N_CHUNK * s.n_lanes : w.logits;
}

// pass 1: stats = maximum [n_lanes] and sum of exponentials [n_lanes] over one chunk; kept = where its logits stay, or
// null
void chunk_stats(const ggml_tensor * dst, const score_shape & s, int64_t g, int64_t chunk, const score_scratch & w,
                 float * kept, float * stats) {
    float * max = stats;
    float * sum = stats + s.n_lanes;
    std::fill(max, max + s.n_lanes, -INFINITY);
    std::fill(sum, sum + s.n_lanes, 0.0f);

    const int64_t i1 = std::min(s.n_kv, (chunk + 1) * N_CHUNK);
    for (int64_t i0 = chunk * N_CHUNK; i0 < i1; i0 += N_TILE) {
        float * logits = logits_of(s, w, kept, i0);
        tile_logits(dst, s, g, i0, std::min(N_TILE, i1 - i0), w, logits);

        float * shift = w.lse;
        std::copy(max, max + s.n_lanes, shift);
        for (int64_t t = 0; t < N_TILE; ++t) {
            const float * x = logits + t * s.n_lanes;
            for (int64_t r = 0; r < s.n_lanes; ++r) {
                shift[r] = shift[r] > x[r] ? shift[r] : x[r];
            }
        }
        for (int64_t r = 0; r < s.n_lanes; ++r) {
            if (shift[r] != max[r]) {
                // nothing seen yet: the sum is 0
                sum[r] *= expf(max[r] - shift[r]);
                max[r] = shift[r];
            }
            shift[r] = max[r] == -INFINITY ? 0.0f : max[r];
        }
        tile_exps(s, logits, shift, w);
        for (int64_t t = 0; t < N_TILE; ++t) {
            const float * p = w.exps + t * s.n_lanes;
            for (int64_t r = 0; r < s.n_lanes; ++r) {
                sum[r] += p[r];
            }
        }
    }
}

// log-sum-exp of every row of a KV head, over all chunks and the sink; infinite where there is no row or no key
void head_lse(const ggml_tensor * dst, const score_shape & s, int64_t g, const float * stats, float * lse) {
    const ggml_tensor * sinks = dst->src[3];

    std::fill(lse, lse + s.n_lanes, INFINITY);
    for (int64_t r = 0; r < s.n_rows; ++r) {
        float max = sinks ? ((const float *) sinks->data)[g * s.n_group + r / s.n_q] : -INFINITY;

        double sum = sinks ? 1.0 : 0.0;
        for (int64_t c = 0; c < s.n_chunks; ++c) {
            const float * st = stats + 2 * (g * s.n_chunks + c) * s.n_lanes + r;

            const float max_chunk = st[0];
            if (max_chunk == -INFINITY) {
                continue;
            }
            const float max_new = std::max(max, max_chunk);
            sum                 = sum * exp((double) max - max_new) + st[s.n_lanes] * exp((double) max_chunk - max_new);
            max                 = max_new;
        }
        lse[r] = max == -INFINITY ? INFINITY : max + (float) log(sum);
    }
}

float sum_lanes(const float * p, int64_t n_lanes) {
    vec_f32 acc = {};
    for (int64_t r = 0; r < n_lanes; r += N_LANE) {
        acc += *(const vec_f32 *) (p + r);
    }
    float lanes[N_LANE];
    memcpy(lanes, &acc, sizeof(lanes));
    for (int64_t n = N_LANE / 2; n > 0; n /= 2) {
        for (int64_t i = 0; i < n; ++i) {
            lanes[i] += lanes[i + n];
        }
    }
    return lanes[0];
}

// pass 2: the scores of one chunk; kept = its logits, or null
void chunk_scores(const ggml_tensor * dst, const score_shape & s, int64_t g, int64_t chunk, const score_scratch & w,
                  float * kept) {
    float * res = (float *) dst->data + g * s.n_kv;

    const int64_t i1 = std::min(s.n_kv, (chunk + 1) * N_CHUNK);
    for (int64_t i0 = chunk * N_CHUNK; i0 < i1; i0 += N_TILE) {
        const int64_t n      = std::min(N_TILE, i1 - i0);
        float *       logits = logits_of(s, w, kept, i0);
        if (!kept) {
            tile_logits(dst, s, g, i0, n, w, logits);
        }
        tile_exps(s, logits, w.lse, w);
        for (int64_t t = 0; t < n; ++t) {
            res[i0 + t] = sum_lanes(w.exps + t * s.n_lanes, s.n_lanes) / (float) s.n_group;
        }
    }
}

// the first node; a thread has the same items in both
void compute_work(ggml_tensor * dst, int ith, int nth) {
    const score_shape s(dst);
    if (ith >= s.n_items) {
        return;
    }
    const score_parts   parts(s, dst);
    const score_scratch w(s);

    int64_t g_now = -1;  // head of w.qt
    for (int64_t item = ith; item < s.n_items; item += nth) {
        const int64_t g = item / s.n_chunks;
        if (g != g_now) {
            load_queries(dst->src[0], s, g, w);
            g_now = g;
        }
        chunk_stats(dst, s, g, item % s.n_chunks, w, parts.kept(item), parts.stats + 2 * item * s.n_lanes);
    }
}

// the second node
void compute_score(ggml_tensor * dst, int ith, int nth) {
    const score_shape s(dst);
    if (ith >= s.n_items) {
        return;
    }
    const score_parts   parts(s, dst->src[4]);
    const score_scratch w(s);

    int64_t g_now = -1;  // head of w.qt
    int64_t g_lse = -1;  // head of w.lse
    for (int64_t item = ith; item < s.n_items; item += nth) {
        const int64_t g    = item / s.n_chunks;
        float *       kept = parts.kept(item);
        if (!kept && g != g_now) {
            load_queries(dst->src[0], s, g, w);
            g_now = g;
        }
        if (g != g_lse) {
            head_lse(dst, s, g, parts.stats, w.lse);
            g_lse = g;
        }
        chunk_scores(dst, s, g, item % s.n_chunks, w, kept);
    }
}

// ggml-base has the kernel for as long as this library is loaded
struct registration {
    ggml_laq_score_cpu kernel = { compute_work, compute_score, /*rank =*/1, /*next =*/nullptr };

    registration() {
#ifdef LAQ_CPU_VARIANTS
        kernel.rank = ggml_backend_score();
#endif
        ggml_laq_score_cpu_add(&kernel);
    }

    ~registration() { ggml_laq_score_cpu_remove(&kernel); }
};

registration registered;

}  // namespace
