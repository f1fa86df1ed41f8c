#pragma once

// What the patches in patches/ call. Every call sits behind a null check of the attached laq_cache, so a context
// that has none runs the same instructions as the unpatched build but for that check.

#include <cstdint>

struct ggml_tensor;
struct laq_cache;
struct llm_graph_context;

class llama_io_read_i;
class llama_io_write_i;

// llm_graph_context::build_attn_mha: append the last queries of this ubatch to the ring of layer il
//   q: [n_embd_head_k, n_head, n_tokens], before it is split into streams
void laq_graph_capture(laq_cache & laq, const llm_graph_context & gctx, ggml_tensor * q, ggml_tensor * kq_b,
                       ggml_tensor * sinks, float kq_scale, int il);

// llm_graph_context::build_attn_mha: while a prompt is read in view of its archive, K and V of all tokens stand in place of
// those of the cells
//   k, v: as llama_kv_cache::get_k() and get_v() give them; kq_mask: what this ubatch sees of the cells
void laq_graph_attend(laq_cache & laq, const llm_graph_context & gctx, ggml_tensor *& k, ggml_tensor *& v,
                      ggml_tensor *& kq_mask, int il);

// llm_graph_context::build_attn_mha: the same for what attention gives, where values are fitted
//   out: [n_embd_head_v*n_head, n_tokens]
void laq_graph_capture_output(laq_cache & laq, const llm_graph_context & gctx, ggml_tensor * out, int il);

// llama_kv_cache::clear: everything is gone
void laq_kv_clear(laq_cache & laq);

// llama_kv_cache::seq_rm with normalized 0 <= p0, p1; seq_id -1 = any. false = reaches into evicted positions
bool laq_kv_seq_rm(laq_cache & laq, int32_t seq_id, int32_t p0, int32_t p1);

// llama_kv_cache::seq_cp: false = one of the two has been evicted, whose cells cannot be shared
bool laq_kv_seq_cp(const laq_cache & laq, int32_t src, int32_t dst);

// llama_kv_cache::seq_keep: the other sequences are gone
void laq_kv_seq_keep(laq_cache & laq, int32_t seq_id);

// llama_kv_cache::seq_add, seq_div: logs an error that names the function; always true
bool laq_kv_refuse(const laq_cache & laq, const char * what);

// llama_kv_cache::get_n_kv: cells that attention looks at are rounded up to a multiple of this
uint32_t laq_kv_pad(const laq_cache & laq);

// llama_kv_cache::init_batch: no cells for n_tokens more tokens; the update that follows makes room
void laq_kv_no_slot(laq_cache & laq, uint32_t n_tokens);

// llama_kv_cache::init_update: is there an eviction to do?
bool laq_kv_has_update(laq_cache & laq, bool optimize);

// llama_kv_cache::update: do it. false = it failed and the cache is as before
bool laq_kv_update(laq_cache & laq);

// llama_kv_cache::state_write, state_read: the tables that go in front of the cells; seq_id -1 = of all sequences
void laq_kv_state_write(const laq_cache & laq, llama_io_write_i & io, int32_t seq_id);
void laq_kv_state_read(laq_cache & laq, llama_io_read_i & io, int32_t seq_id);

// llama_kv_cache::state_read: the cells have been read
void laq_kv_state_done(laq_cache & laq);

// llama_context::sched_reserve: the graph of an eviction computes in the same buffers; throws if there is no memory
void laq_graph_reserve(laq_cache & laq);
