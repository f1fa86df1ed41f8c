#include "laq-recall-score.h"

#include "laq-cache.h"
#include "laq-graph.h"
#include "laq-score.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <set>

// Keys that both places are measured with: in a context of this size what a pass costs is more than what a call does.
constexpr int64_t N_SAMPLE  = 4096;
constexpr double  MS_SAMPLE = 15.0;  // no further repetition after this

//
// the op
//

static ggml_context_ptr new_context(std::vector<uint8_t> & meta) {
    meta.resize(24 * ggml_tensor_overhead() + ggml_graph_overhead());
    return ggml_context_ptr(ggml_init({ meta.size(), meta.data(), true }));
}

static void compute(ggml_backend_t backend, ggml_context * c, ggml_tensor * res) {
    ggml_cgraph * gf = ggml_new_graph(c);
    ggml_build_forward_expand(gf, res);
    if (ggml_backend_graph_compute(backend, gf) != GGML_STATUS_SUCCESS) {
        throw laq_error(LAQ_STATUS_COMPUTE_FAILED, "the score graph of the archive failed");
    }
}

static ggml_tensor * over(ggml_tensor * t, const void * data) {
    t->data = const_cast<void *>(data);
    return t;
}

// the keys in host memory, written by the threads of the CPU's backend
static ggml_tensor * keys_of(ggml_context * c, const laq_head_op & op) {
    if (!op.fill) {
        return over(ggml_new_tensor_2d(c, op.type, op.n_embd_head, op.n_kv), op.k);
    }
    const auto fill = [](ggml_tensor * dst, int ith, int nth, void * data) {
        ((const laq_head_op *) data)->fill(dst->ne[1] * ith / nth, dst->ne[1] * (ith + 1) / nth);
    };
    return over(ggml_custom_4d(c, op.type, op.n_embd_head, op.n_kv, 1, 1, nullptr, 0, fill, GGML_N_TASKS_MAX,
                               const_cast<laq_head_op *>(&op)),
                op.k);
}

// by the CPU, which reads what the op points to where it is
static void score_in_place(ggml_backend_t cpu, const laq_head_op & op, float * dst) {
    std::vector<uint8_t>   meta;
    const ggml_context_ptr ctx  = new_context(meta);
    ggml_context *         c    = ctx.get();
    ggml_tensor *          q    = over(ggml_new_tensor_3d(c, GGML_TYPE_F32, op.n_embd_head, op.n_q, op.n_group), op.q);
    ggml_tensor *          k    = keys_of(c, op);
    ggml_tensor *          mask = over(ggml_new_tensor_2d(c, GGML_TYPE_F32, op.n_kv, op.n_q), op.mask);
    ggml_tensor * sinks         = op.sinks ? over(ggml_new_tensor_1d(c, GGML_TYPE_F32, op.n_group), op.sinks) : nullptr;
    if (!op.v) {
        compute(cpu, c, over(ggml_laq_score(c, q, k, mask, sinks, op.scale, op.softcap), dst));
        return;
    }
    ggml_tensor * v   = over(ggml_new_tensor_2d(c, op.type_v, op.n_embd_head_v, op.n_kv), op.v);
    ggml_tensor * res = ggml_laq_score_outputs(c, q, k, v, mask, sinks, op.scale, op.softcap);

    std::vector<float> both(res->ne[0]);
    compute(cpu, c, over(res, both.data()));
    std::copy(both.begin(), both.begin() + op.n_kv, dst);
    std::copy(both.begin() + op.n_kv, both.end(), op.outputs);
}

bool laq_score_stream::supported(ggml_backend_t backend, const laq_head_size & most) {
    std::vector<uint8_t>   meta;
    const ggml_context_ptr ctx = new_context(meta);
    ggml_context *         c   = ctx.get();
    return ggml_backend_supports_op(
        backend, ggml_laq_score(c, ggml_new_tensor_3d(c, GGML_TYPE_F32, most.n_embd_head, most.n_q, most.n_group),
                                ggml_new_tensor_2d(c, most.type, most.n_embd_head, most.n_kv),
                                ggml_new_tensor_2d(c, GGML_TYPE_F32, most.n_kv, most.n_q),
                                ggml_new_tensor_1d(c, GGML_TYPE_F32, most.n_group), 1.0f, 0.0f));
}

laq_score_stream::laq_score_stream(ggml_backend_t backend, const laq_head_size & most) :
    backend(backend), most(most), ctx(ggml_init({ 8 * ggml_tensor_overhead(), nullptr, true })) {
    ggml_context * c = ctx.get();

    q     = ggml_new_tensor_1d(c, GGML_TYPE_F32, most.n_embd_head * most.n_q * most.n_group);
    k     = ggml_new_tensor_1d(c, most.type, most.n_embd_head * most.n_kv);
    mask  = ggml_new_tensor_1d(c, GGML_TYPE_F32, most.n_kv * most.n_q);
    sinks = ggml_new_tensor_1d(c, GGML_TYPE_F32, most.n_group);
    res   = ggml_new_tensor_1d(c, GGML_TYPE_F32, most.n_kv);
    buf.reset(ggml_backend_alloc_ctx_tensors(c, backend));
    if (!buf) {
        throw laq_error(
            LAQ_STATUS_NO_MEMORY,
            std::string(ggml_backend_name(backend)) +
                " has no memory for the buffer that archived keys are scored in: recall_device = cpu takes none");
    }
    ggml_backend_buffer_clear(buf.get(), 0);
    // what the kernel allocates for itself grows with the keys: let it have all of it now
    const laq_head_op op = { most.type, most.n_embd_head, most.n_group, most.n_q, most.n_kv, nullptr, nullptr, nullptr,
                             0,         nullptr,          1.0f,         0.0f };
    const ggml_context_ptr gc = new_context(meta);
    compute(backend, gc.get(), add(op, gc.get(), false));
}

bool laq_score_stream::fits(const laq_head_op & op) const {
    return !op.v && op.type == most.type && op.n_kv <= most.n_kv && op.n_group <= most.n_group &&
           op.n_embd_head * op.n_kv <= most.n_embd_head * most.n_kv && op.n_kv * op.n_q <= most.n_kv * most.n_q &&
           op.n_embd_head * op.n_q * op.n_group <= most.n_embd_head * most.n_q * most.n_group;
}

// the op over views of the buffer, into which what it reads is written
ggml_tensor * laq_score_stream::add(const laq_head_op & op, ggml_context * c, bool upload) {
    const size_t n_row   = ggml_row_size(op.type, op.n_embd_head);
    const size_t n_row_q = op.n_embd_head * sizeof(float);
    const auto   set     = [&](ggml_tensor * t, const void * data, bool is_new = true) {
        ggml_backend_view_init(t);
        if (upload && is_new) {
            ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t));
        }
        return t;
    };
    ggml_tensor * v_q = set(ggml_view_3d(c, q, op.n_embd_head, op.n_q, op.n_group, n_row_q, n_row_q * op.n_q, 0), op.q);
    ggml_tensor * v_k = set(ggml_view_2d(c, k, op.n_embd_head, op.n_kv, n_row, 0), op.k);
    ggml_tensor * v_m = set(ggml_view_2d(c, mask, op.n_kv, op.n_q, op.n_kv * sizeof(float), 0), op.mask,
                            mask_id == 0 || mask_id != op.mask_id);
    ggml_tensor * v_s = op.sinks ? set(ggml_view_1d(c, sinks, op.n_group, 0), op.sinks) : nullptr;

    mask_id           = op.mask_id;
    ggml_tensor * out = ggml_laq_score(c, v_q, v_k, v_m, v_s, op.scale, op.softcap);
    ggml_backend_tensor_alloc(res->buffer, out, res->data);
    return out;
}

void laq_score_stream::score(const laq_head_op & op, float * dst) {
    const ggml_context_ptr gc  = new_context(meta);
    ggml_tensor *          out = add(op, gc.get(), true);
    compute(backend, gc.get(), out);
    ggml_backend_tensor_get(out, dst, 0, ggml_nbytes(out));
}

//
// which place
//

// A head of zeros, whose scores take as long as any. The mask stays where it is, as between the heads of a re-selection.
struct sample_head {
    std::vector<uint8_t> k;
    std::vector<float>   q, mask, res;
    laq_head_op          op;

    explicit sample_head(const laq_head_size & size) :
        k(ggml_row_size(size.type, size.n_embd_head) * size.n_kv), q(size.n_embd_head * size.n_q * size.n_group),
        mask(size.n_kv * size.n_q), res(size.n_kv),
        op{ size.type, size.n_embd_head, size.n_group, size.n_q, size.n_kv, k.data(),
            q.data(),  mask.data(),      UINT64_MAX,   nullptr,  1.0f,      0.0f } {}
};

// the first time is a warm-up, where there is time for a second
static double best_ms(const std::function<void()> & run) {
    double best  = INFINITY;
    double total = 0.0;
    for (int i = 0; i < 3 && total < MS_SAMPLE; ++i) {
        const int64_t t0 = ggml_time_us();
        run();
        const double ms = (ggml_time_us() - t0) / 1000.0;
        best            = std::min(best, ms);
        total += ms;
    }
    return best;
}

static bool is_cpu(ggml_backend_dev_t dev) {
    return ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

double laq_time_score_on(ggml_backend_t backend, const laq_head_size & size) {
    sample_head              s(size);
    const ggml_backend_dev_t dev = ggml_backend_get_device(backend);
    if (is_cpu(dev)) {
        return best_ms([&] { score_in_place(backend, s.op, s.res.data()); });
    }
    if (!laq_score_stream::supported(backend, size)) {
        throw laq_error(LAQ_STATUS_UNSUPPORTED, laq_what_has(dev, false, size.type, size.n_embd_head));
    }
    laq_score_stream stream(backend, size);
    return best_ms([&] { stream.score(s.op, s.res.data()); });
}

// the context's own backend of a device: another one would have streams and pools of its own
static ggml_backend_t backend_of(const laq_cache & laq, ggml_backend_dev_t dev) {
    ggml_backend_sched_t sched = laq.ctx->get_sched();
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        ggml_backend_t backend = ggml_backend_sched_get_backend(sched, i);
        if (ggml_backend_get_device(backend) == dev) {
            return backend;
        }
    }
    return nullptr;
}

laq_recall_scorer::laq_recall_scorer(int n_threads) :
    cpu(ggml_backend_dev_init(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), nullptr)) {
    if (!cpu) {
        throw laq_error(LAQ_STATUS_NO_MEMORY, "the CPU backend, which scores what is archived, could not be made");
    }
    laq_set_threads(cpu.get(), n_threads);
}

void laq_recall_scorer::because(const std::string & why) {
    reason += (reason.empty() ? "" : "; ") + why;
}

bool laq_recall_scorer::is_faster(laq_score_stream & stream, ggml_backend_dev_t dev, const laq_head_size & size) {
    sample_head  s(size);
    const double here  = best_ms([&] { score_in_place(cpu.get(), s.op, s.res.data()); });
    const double there = best_ms([&] { stream.score(s.op, s.res.data()); });
    ms_cpu             = std::max(ms_cpu, here);
    ms_device          = std::max(ms_device, there);
    char text[128];
    snprintf(text, sizeof(text), "%d keys of a KV head take %.2f ms on the CPU, %.2f ms on ", (int) size.n_kv, here,
             there);
    because(text + std::string(ggml_backend_dev_name(dev)));
    return there < here;
}

std::unique_ptr<laq_score_stream> laq_recall_scorer::choose(const laq_cache & laq, ggml_backend_dev_t dev,
                                                            const laq_head_size & most) {
    const laq_params & p          = laq.params;
    const bool         may_choose = p.recall_device == LAQ_RECALL_ON_AUTO;
    if (p.recall_device == LAQ_RECALL_ON_CPU) {
        because("recall_device = cpu was asked for");
        return nullptr;
    }
    if (may_choose && dev && is_cpu(dev)) {
        because("the layers are on the CPU");
        return nullptr;
    }
    ggml_backend_t backend = !dev ? nullptr : is_cpu(dev) ? cpu.get() : backend_of(laq, dev);
    try {
        if (!backend || !laq_score_stream::supported(backend, most)) {
            throw laq_error(LAQ_STATUS_UNSUPPORTED, laq_what_has(dev, false, most.type, most.n_embd_head) +
                                                        ": recall_device = auto or cpu lets the CPU score");
        }
        auto stream = std::make_unique<laq_score_stream>(backend, most);
        if (!may_choose) {
            because("recall_device = device was asked for");
            return stream;
        }
        const laq_query_range asked = laq_policy_queries(p, laq.n_ctx, laq.n_ctx + p.n_lookahead);

        laq_head_size size = most;
        size.n_kv          = std::min(most.n_kv, N_SAMPLE);
        size.n_q           = std::clamp<int64_t>(asked.last - asked.first, 1, most.n_q);
        return is_faster(*stream, dev, size) ? std::move(stream) : nullptr;
    } catch (const laq_error & e) {
        if (!may_choose) {
            throw;
        }
        because(e.what());
        return nullptr;
    }
}

// Candidates of a head have different positions, and none is beyond n_ctx but for pseudo tokens.
static laq_head_size most_of(const laq_cache & laq, ggml_backend_dev_t dev, ggml_type type_k) {
    const laq_params & p   = laq.params;
    laq_head_size      res = { type_k, 0, 0, std::max(p.n_window + p.n_lookahead, p.n_window_snapkv),
                               (int64_t) laq.n_ctx + p.n_lookahead };
    for (uint32_t ikv = 0; ikv < laq.layers.size(); ++ikv) {
        const laq_layer & layer = laq.layers[ikv];
        if (laq_device_of(laq.k(ikv)->buffer) == dev) {
            res.n_embd_head = std::max<int64_t>(res.n_embd_head, layer.n_embd_head_k);
            res.n_group     = std::max<int64_t>(res.n_group, layer.n_head / layer.n_head_kv);
        }
    }
    return res;
}

void laq_recall_scorer::place(const laq_cache & laq, ggml_type type_k) {
    std::set<std::string>           names;
    std::vector<ggml_backend_dev_t> devs;
    std::vector<laq_score_stream *> of_dev;
    for (uint32_t ikv = 0; ikv < laq.layers.size(); ++ikv) {
        const ggml_backend_dev_t dev = laq_device_of(laq.k(ikv)->buffer);
        size_t                   i   = std::find(devs.begin(), devs.end(), dev) - devs.begin();
        if (i == devs.size()) {
            auto stream = choose(laq, dev, most_of(laq, dev, type_k));
            devs.push_back(dev);
            of_dev.push_back(stream.get());
            const std::string name =
                stream ? ggml_backend_dev_name(dev) : ggml_backend_dev_name(ggml_backend_get_device(cpu.get()));
            if (names.insert(name).second) {
                devices += (devices.empty() ? "" : " ") + name;
            }
            if (stream) {
                streams.push_back(std::move(stream));
            }
        }
        of_layer.push_back(of_dev[i]);
    }
}

uint8_t * laq_recall_scorer::keys(uint32_t ikv, size_t size) {
    return gathered[i_gathered].get(of_layer[ikv] ? of_layer[ikv]->device() : nullptr, size);
}

void laq_recall_scorer::wait() {
    if (running.valid()) {
        running.get();
    }
}

void laq_recall_scorer::abandon() {
    running = {};  // one of std::async() waits when it goes, or has not begun
}

void laq_recall_scorer::start(uint32_t ikv, const laq_head_op & op, float * dst) {
    laq_score_stream * stream = of_layer[ikv];
    if (!stream || !stream->fits(op)) {
        wait();
        score_in_place(cpu.get(), op, dst);
        return;
    }
    if (op.fill) {
        std::vector<uint8_t>   meta;
        const ggml_context_ptr ctx = new_context(meta);
        compute(cpu.get(), ctx.get(), keys_of(ctx.get(), op));
    }
    wait();
    // the CPU's backend does one thing at a time: it scores when it is waited for
    const auto when = is_cpu(stream->device()) ? std::launch::deferred : std::launch::async;
    running         = std::async(when, [stream, op, dst] { stream->score(op, dst); });
    i_gathered      = 1 - i_gathered;
}

uint64_t laq_recall_scorer::bytes() const {
    uint64_t res = 0;
    for (const auto & stream : streams) {
        res += stream->bytes();
    }
    return res;
}
