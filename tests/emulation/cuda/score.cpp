// The kernels of LAQ_SCORE for ggml-cuda, run on the emulator.

#include "device.h"

#include "laq-score-launch.cuh"

#include <string>
#include <vector>

bool emulated_sm_80 = true;

namespace {

struct range {
    const char * begin;
    size_t       size;
};

std::vector<range> readable;

template <typename T> class memory {
  public:
    explicit memory(size_t n) : data(n + 1) {
        memset(data.data(), 0xff, data.size() * sizeof(T));
        readable.push_back({ (const char *) data.data(), n * sizeof(T) });
    }

    T * get() { return data.data(); }

  private:
    std::vector<T> data;
};

struct launcher {
    size_t   max_shared;
    bool     mma_bf16;
    int      n_blocks;
    uint64_t seed;

    int n_resident(void (*)(laq_score_params), int, size_t) const { return n_blocks; }

    template <typename T> memory<T> alloc(size_t n) const { return memory<T>(n); }

    void launch(void (*kernel)(laq_score_params), int x, int y, int threads, size_t shared,
                const laq_score_params & p) const {
        simt::options opts;
        opts.seed         = seed;
        opts.group_memory = shared;
        simt::run({ (unsigned) x, (unsigned) y, 1 }, { (unsigned) threads, 1, 1 }, opts, [&] { kernel(p); });
    }
};

}  // namespace

void check_read(const void * ptr, size_t size) {
    for (const range & r : readable) {
        if ((const char *) ptr >= r.begin && (const char *) ptr + size <= r.begin + r.size) {
            return;
        }
    }
    simt::fail("a load from memory that is no input");
}

struct emulate_args {
    int32_t type;    // laq_key_type
    int32_t sm;      // compute capability, 75 or from 80
    int32_t shared;  // bytes of shared memory of a block
    int32_t n_blocks;
    int32_t seed;
    int32_t n_embd, n_q, n_head, n_head_kv, n_kv;
    int32_t row_bytes;
    float   scale, softcap;
    int64_t nbq1, nbq2, nbk1, nbk2;
    int64_t q_bytes, k_bytes;

    const char *  q;
    const char *  k;
    const float * mask;
    const float * sinks;
    float *       res;
};

// null, or what is wrong
extern "C" const char * emulate_score(const emulate_args * a) {
    static std::string message;

    emulated_sm_80 = a->sm >= 80;

    laq_score_params p = {};
    p.q                = a->q;
    p.k                = a->k;
    p.mask             = a->mask;
    p.sinks            = a->sinks;
    p.res              = a->res;
    p.nbq1             = a->nbq1;
    p.nbq2             = a->nbq2;
    p.nbk1             = a->nbk1;
    p.nbk2             = a->nbk2;
    p.row_bytes        = a->row_bytes;
    laq_set_shape(p, a->n_embd, a->n_q, a->n_head, a->n_head_kv, a->n_kv);
    laq_set_scale(p, a->scale, a->softcap);

    readable = { { a->q, (size_t) a->q_bytes }, { a->k, (size_t) a->k_bytes } };
    if (a->mask) {
        readable.push_back({ (const char *) a->mask, sizeof(float) * a->n_q * a->n_kv });
    }
    if (a->sinks) {
        readable.push_back({ (const char *) a->sinks, sizeof(float) * a->n_head });
    }
    launcher l = { (size_t) a->shared, a->sm >= 80, a->n_blocks, (uint64_t) a->seed };
    try {
        return laq_run(l, (laq_key_type) a->type, p, false) ? nullptr : "the queries do not fit into shared memory";
    } catch (const simt::error & e) {
        message = e.what();
        return message.c_str();
    }
}
