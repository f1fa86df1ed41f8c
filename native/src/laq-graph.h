#pragma once

#include "laq.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <cstdint>
#include <string>
#include <vector>

struct laq_cache;
struct laq_layer;
struct laq_observation;

// the device of a buffer; the CPU's buffer type names none
ggml_backend_dev_t laq_device_of(ggml_backend_buffer_t buffer);

// threads of a backend that has such
void laq_set_threads(ggml_backend_t backend, int n_threads);

// Run a node where a tensor of the cache is. Comes after ggml_backend_sched_reset(): by itself the scheduler goes on with
// the device of the node before, which is another one where layers are split.
void laq_graph_place(ggml_backend_sched_t sched, ggml_tensor * node, const ggml_tensor * beside);

// Decides whether graphs attend to the archive while a prompt is read, and in how many tokens at once.
void laq_choose_attend(laq_cache & laq);

// let the scheduler plan for the largest graph that does; throws laq_error
void laq_graph_reserve_attend(laq_cache & laq);

// the queries in the ring of a layer, or the outputs: F16 [n_row, n_slots]
ggml_tensor * laq_ring_view(ggml_context * ctx, const laq_layer & layer, bool outputs);

// Slots of observed queries in the ring, and what they see of keys: none after their own position. pos = positions of
// the keys, INT32_MAX where a cell has none; mask: F32 [keys, queries].
void laq_set_observed(ggml_tensor * slots, ggml_tensor * mask, const std::vector<laq_observation> & obs,
                      const std::vector<int32_t> & pos);

// in words: whether a device has the fused kernel for keys of a type and a head size
std::string laq_what_has(ggml_backend_dev_t dev, bool supported, ggml_type type_k, int64_t n_embd_head);

// Whether the fused op runs where the keys are. Throws laq_error if it was asked for and does not.
bool laq_score_fused(const ggml_tensor * op, ggml_backend_dev_t dev, laq_score_kernel kernel);

// attention of queries [d, n_q, n_head] to keys [d, n_kv, n_head_kv], the rows of a group together: [n_kv, n_rows, n_head_kv]
ggml_tensor * laq_attention(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * mask,
                            ggml_tensor * sinks, float scale, float softcap);

// ggml_laq_score() from existing ops, for backends without the kernel; stores the probabilities of all queries
ggml_tensor * laq_score_composed(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * mask,
                                 ggml_tensor * sinks, float scale, float softcap);
