// ggml-metal for the host side of laq-score.metal: its encoder runs each kernel on the emulator, at once

#include "kernels.h"
#include "simt.h"

#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "laq-metal.h"
#include "laq-score-impl.h"

#include <cstdio>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

//
// ggml-metal
//

struct ggml_metal_pipeline {
    launcher run;
};

struct ggml_metal_library {
    std::map<std::string, ggml_metal_pipeline> compiled;
};

struct ggml_metal_encoder {
    std::vector<char> args;
    launch            now   = {};
    launcher          run   = nullptr;
    size_t            smem  = 0;
    uint64_t          seed  = 0;
    bool              fresh = true;  // no kernel since the last barrier
};

ggml_metal_pipeline_with_params ggml_metal_library_get_pipeline(ggml_metal_library_t lib, const char * name) {
    const auto found = lib->compiled.find(name);

    ggml_metal_pipeline_with_params res = {};
    res.pipeline                        = found == lib->compiled.end() ? nullptr : &found->second;
    return res;
}

ggml_metal_pipeline_with_params ggml_metal_library_compile_pipeline(ggml_metal_library_t lib, const char * base,
                                                                    const char * name, ggml_metal_cv_t) {
    const launcher run = find_kernel(base);
    if (!run) {
        throw std::runtime_error(std::string("no kernel is named ") + base);
    }
    lib->compiled[name] = { run };
    return ggml_metal_library_get_pipeline(lib, name);
}

void ggml_metal_encoder_set_pipeline(ggml_metal_encoder_t enc, ggml_metal_pipeline_with_params pipeline) {
    enc->run = pipeline.pipeline->run;
}

void ggml_metal_encoder_set_bytes(ggml_metal_encoder_t enc, void * data, size_t size, int) {
    enc->args.assign((char *) data, (char *) data + size);
    enc->now      = {};
    enc->now.args = enc->args.data();
}

void ggml_metal_encoder_set_buffer(ggml_metal_encoder_t enc, ggml_metal_buffer_id buffer, int idx) {
    enc->now.buffers.at(idx) = (char *) buffer.metal + buffer.offs;
}

void ggml_metal_encoder_set_threadgroup_memory_size(ggml_metal_encoder_t enc, size_t size, int) {
    enc->smem = size;
}

void ggml_metal_encoder_memory_barrier(ggml_metal_encoder_t enc) {
    enc->fresh = true;
}

void ggml_metal_encoder_dispatch_threadgroups(ggml_metal_encoder_t enc, int tg0, int tg1, int tg2, int n0, int n1,
                                              int n2) {
    // each kernel here reads what the one before has written
    if (!enc->fresh) {
        throw std::runtime_error("a kernel is dispatched without a barrier after the one before");
    }
    enc->fresh = false;

    simt::options opts;
    opts.seed         = enc->seed;
    opts.group_memory = enc->smem;
    simt::run({ (unsigned) tg0, (unsigned) tg1, (unsigned) tg2 }, { (unsigned) n0, (unsigned) n1, (unsigned) n2 }, opts,
              [enc] { enc->run(enc->now); });
}

ggml_metal_buffer_id ggml_metal_buffer_get_id(ggml_metal_buffer_t, const ggml_tensor * t) {
    return { (char *) t->data - 16, 16 };
}

//
// ggml
//

size_t ggml_nbytes(const ggml_tensor * t) {
    return t->ne[0] * t->ne[1] * sizeof(float);  // of the result
}

const char * ggml_type_name(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:  return "f32";
        case GGML_TYPE_F16:  return "f16";
        case GGML_TYPE_BF16: return "bf16";
        case GGML_TYPE_Q8_0: return "q8_0";
        case GGML_TYPE_Q4_0: return "q4_0";
        case GGML_TYPE_Q4_1: return "q4_1";
        case GGML_TYPE_Q5_0: return "q5_0";
        case GGML_TYPE_Q5_1: return "q5_1";
        default:             return "unknown";
    }
}

// the node that emulate() makes; the first one of the op is not needed here
bool ggml_laq_is_score(const ggml_tensor * node) {
    return node->op == GGML_OP_CUSTOM;
}

bool ggml_laq_is_score_work(const ggml_tensor *) {
    return false;
}

//
// what Python calls
//

// a copy that ends where the next page faults
class guarded {
  public:
    guarded(const void * src, size_t size) {
        if (!src) {
            return;
        }
        const size_t page = (size_t) sysconf(_SC_PAGESIZE);
        const size_t used = (size + page - 1) / page * page;
        bytes             = used + page;
        base              = (char *) mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
        if (base == MAP_FAILED || mprotect(base + used, page, PROT_NONE) != 0) {
            throw std::runtime_error("no memory for a copy of the inputs");
        }
        data = base + used - size;
        memcpy(data, src, size);
    }

    guarded(const guarded &)             = delete;
    guarded & operator=(const guarded &) = delete;

    ~guarded() {
        if (base) {
            munmap(base, bytes);
        }
    }

    char * data  = nullptr;
    char * base  = nullptr;
    size_t bytes = 0;
};

extern "C" {

struct score_args {
    int32_t      type_k;
    int32_t      n_embd;
    int32_t      n_q;
    int32_t      n_head;
    int32_t      n_head_kv;
    int32_t      n_kv;
    float        scale;
    float        softcap;
    uint64_t     nbq1;
    uint64_t     nbq2;
    uint64_t     nbk1;
    uint64_t     nbk2;
    uint64_t     size_q;  // bytes, as size_k
    uint64_t     size_k;
    uint64_t     seed;
    uint64_t     max_smem;
    const void * q;
    const void * k;
    const void * mask;
    const void * sinks;
};

// 0: done, 1: not supported, 2: an error, with its message
int laq_emulate(const score_args * a, float * dst, char * message, size_t n_message);
}

static int emulate(const score_args & a, float * dst) {
    const guarded q(a.q, a.size_q);
    const guarded k(a.k, a.size_k);
    const guarded mask(a.mask, sizeof(float) * a.n_kv * a.n_q);
    const guarded sinks(a.sinks, sizeof(float) * a.n_head);

    ggml_backend_buffer buffer = {};
    const auto          tensor = [&](ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2, void * data) {
        ggml_tensor t = {};
        t.type        = type;
        t.buffer      = &buffer;
        t.data        = data;
        t.ne[0]       = ne0;
        t.ne[1]       = ne1;
        t.ne[2]       = ne2;
        t.ne[3]       = 1;
        t.nb[0]       = sizeof(float);
        t.nb[1]       = t.nb[0] * ne0;
        t.nb[2]       = t.nb[1] * ne1;
        t.nb[3]       = t.nb[2] * ne2;
        return t;
    };

    ggml_tensor tq = tensor(GGML_TYPE_F32, a.n_embd, a.n_q, a.n_head, q.data);
    ggml_tensor tk = tensor((ggml_type) a.type_k, a.n_embd, a.n_kv, a.n_head_kv, k.data);
    ggml_tensor tm = tensor(GGML_TYPE_F32, a.n_kv, a.n_q, 1, mask.data);
    ggml_tensor ts = tensor(GGML_TYPE_F32, a.n_head, 1, 1, sinks.data);
    ggml_tensor op = tensor(GGML_TYPE_F32, a.n_kv, a.n_head_kv, 1, nullptr);

    tq.nb[1]  = a.nbq1;
    tq.nb[2]  = a.nbq2;
    tk.nb[1]  = a.nbk1;
    tk.nb[2]  = a.nbk2;
    op.src[0] = &tq;
    op.src[1] = &tk;
    op.src[2] = a.mask ? &tm : nullptr;
    op.src[3] = a.sinks ? &ts : nullptr;

    op.op = GGML_OP_CUSTOM;
    ggml_set_op_params_f32(&op, GGML_LAQ_SCORE_PARAMS, a.scale);
    ggml_set_op_params_f32(&op, GGML_LAQ_SCORE_PARAMS + 1, a.softcap);

    ggml_metal_device_props props    = {};
    props.has_simdgroup_mm           = true;
    props.has_simdgroup_reduction    = true;
    props.max_theadgroup_memory_size = a.max_smem;
    if (!ggml_metal_laq_supported(&op, &props)) {
        return 1;
    }

    // NaNs: what is read must have been written
    const size_t      n_bytes = ggml_nbytes(&op) + ggml_metal_laq_extra(&op);
    std::vector<char> fill(n_bytes, (char) 0xff);
    const guarded     memory(fill.data(), (n_bytes + 63) / 64 * 64);
    op.data = memory.data;

    ggml_metal_library lib;
    ggml_metal_encoder enc;
    enc.seed = a.seed;
    ggml_metal_laq_encode(&lib, &enc, &op);
    memcpy(dst, op.data, ggml_nbytes(&op));
    return 0;
}

int laq_emulate(const score_args * a, float * dst, char * message, size_t n_message) {
    try {
        return emulate(*a, dst);
    } catch (const std::exception & e) {
        snprintf(message, n_message, "%s", e.what());
        return 2;
    }
}
