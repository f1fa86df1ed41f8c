#pragma once

// Where archived and resident keys are scored together: on the CPU, or on the device of the layer's cache, one KV head at a
// time through a buffer that never grows. Both give the same scores. Internal to libllama.

#include "laq-move.h"
#include "laq.h"

#include "ggml-cpp.h"
#include "ggml.h"

#include <cstdint>
#include <functional>
#include <future>
#include <memory>
#include <string>
#include <vector>

struct laq_cache;

// the keys of one KV head, and what they are scored by; all of it in host memory
struct laq_head_op {
    ggml_type     type;  // of the keys
    int64_t       n_embd_head;
    int64_t       n_group;  // heads of the KV head
    int64_t       n_q;
    int64_t       n_kv;
    void *        k;        // [n_kv][n_embd_head]
    const float * q;        // [n_group][n_q][n_embd_head]
    const float * mask;     // [n_q][n_kv]
    uint64_t      mask_id;  // another one where the mask is another one
    const float * sinks;    // [n_group], or NULL
    float         scale;
    float         softcap;

    // Where there are values, what the queries get from the keys as well. By the CPU alone.
    ggml_type    type_v        = GGML_TYPE_COUNT;
    int64_t      n_embd_head_v = 0;
    const void * v             = nullptr;  // [n_kv][n_embd_head_v]
    float *      outputs       = nullptr;  // [n_group][n_q][n_embd_head_v]

    // writes keys and values [i0, i1), by several threads at once; must not throw, nor change what else the op points to.
    // Empty: they are there
    std::function<void(int64_t i0, int64_t i1)> fill;
};

// the most that one op may take
struct laq_head_size {
    ggml_type type;
    int64_t   n_embd_head;
    int64_t   n_group;
    int64_t   n_q;
    int64_t   n_kv;
};

// The fixed buffer of a device, and the op in it.
class laq_score_stream {
  public:
    // throws laq_error if there is no memory
    laq_score_stream(ggml_backend_t backend, const laq_head_size & most);

    static bool supported(ggml_backend_t backend, const laq_head_size & most);

    bool     fits(const laq_head_op & op) const;
    void     score(const laq_head_op & op, float * dst);  // dst [n_kv]
    uint64_t bytes() const { return ggml_backend_buffer_get_size(buf.get()); }

    ggml_backend_dev_t device() const { return ggml_backend_get_device(backend); }

  private:
    ggml_tensor * add(const laq_head_op & op, ggml_context * c, bool upload);

    ggml_backend_t          backend;
    laq_head_size           most;
    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buf;
    ggml_tensor *           q;  // each as large as it may get
    ggml_tensor *           k;
    ggml_tensor *           mask;
    ggml_tensor *           sinks;
    ggml_tensor *           res;
    uint64_t                mask_id = 0;  // of the mask that is there
    std::vector<uint8_t>    meta;         // of the graph: its nodes are at the same addresses each time
};

// what scores the layers of a context with an archive
class laq_recall_scorer {
  public:
    explicit laq_recall_scorer(int n_threads);  // throws laq_error

    // Choose for each device that holds layers, once graphs were built; all memory of devices is allocated here. Throws
    // laq_error if what was asked for cannot be had.
    void place(const laq_cache & laq, ggml_type type_k);

    // Starts to bring the keys of a head together and to score them; dst [n_kv] is written, and what op points to is read,
    // until wait(). Where a device scores, the keys of a head come together while those of the one before it are scored.
    // What does not fit into the device's buffer is scored by the CPU. Throws laq_error.
    void start(uint32_t ikv, const laq_head_op & op, float * dst);
    void wait();
    void abandon();  // no one waits for the scores: what is not done yet need not be, what would be thrown is forgotten

    // whether no device scores: what is started is done then
    bool on_cpu() const { return streams.empty(); }

    // host memory for the keys of the head that is started next
    uint8_t * keys(uint32_t ikv, size_t size);

    uint64_t next_mask() { return ++n_masks; }

    uint64_t bytes() const;

    std::string devices;  // that score, with blanks between them
    std::string reason;
    double      ms_cpu    = 0.0;  // of the sample, 0 = not measured
    double      ms_device = 0.0;  // the slowest one's

  private:
    std::unique_ptr<laq_score_stream> choose(const laq_cache & laq, ggml_backend_dev_t dev, const laq_head_size & most);
    bool is_faster(laq_score_stream & stream, ggml_backend_dev_t dev, const laq_head_size & size);
    void because(const std::string & why);

    ggml_backend_ptr                               cpu;
    std::vector<std::unique_ptr<laq_score_stream>> streams;
    std::vector<laq_score_stream *>                of_layer;  // nullptr: the CPU
    laq_host_buffer                                gathered[2];
    int                                            i_gathered = 0;  // the one for the head that is started next
    std::future<void>                              running;         // after what it uses, so that it ends before
    uint64_t                                       n_masks = 0;
};

// Milliseconds that a device takes for the keys of one KV head, those in host memory at first. Throws laq_error if it has no
// kernel or no memory for them.
double laq_time_score_on(ggml_backend_t backend, const laq_head_size & size);
