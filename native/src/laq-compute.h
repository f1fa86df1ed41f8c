#pragma once

// Graphs of evictions: an own scheduler on the backends of a context, so that the model's graph stays as it is. Its
// buffers are reserved when a context is attached and never grow.

#include "laq-error.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <cstdint>
#include <string>
#include <vector>

// of a backend that computes with threads; others are left as they are
void laq_set_threads(ggml_backend_t backend, int n_threads);

class laq_compute {
  public:
    // backends, buffer types: those of sched. max_nodes: of the largest graph. Throws laq_error.
    laq_compute(ggml_backend_sched_t sched, size_t max_nodes);

    // An empty graph; the one before is gone.
    void begin();

    ggml_context * ctx() const { return meta_ctx.get(); }
    ggml_cgraph *  graph() const { return gf; }

    // Add a node where a tensor of the cache is: by itself the scheduler goes on with the device of the node before,
    // which is another one where layers are split.
    void add(ggml_tensor * node, const ggml_tensor * beside);
    void place(ggml_tensor * node, const ggml_tensor * beside);
    void place_on_cpu(ggml_tensor * node);

    // Make room for the graph; nothing is computed. what: the graph in words, and what makes it smaller. Throws
    // laq_error.
    void reserve(const char * what);

    // Give the nodes their places in the buffers: inputs can be set then. Throws laq_error, and nothing is changed.
    void alloc(const char * what);

    // Compute with n_threads and wait. what: has failed, if a backend does; throws laq_error.
    void run(int n_threads, const char * what);

    uint64_t bytes() const;

  private:
    ggml_backend_ptr       cpu;  // without the abort callback of the context's: an eviction that has begun is done
    ggml_backend_sched_ptr sched;
    std::vector<uint8_t>   meta;
    ggml_context_ptr       meta_ctx;
    ggml_cgraph *          gf = nullptr;
    size_t                 max_nodes;
};
