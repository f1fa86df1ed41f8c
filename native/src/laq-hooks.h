#pragma once

// What the patches in patches/ call. Every call sits behind a null check of the attached laq_context, so a context that
// has none runs the same instructions as the unpatched build but for that check.

#include <cstdint>
#include <vector>

struct ggml_tensor;
struct laq_context;
struct llama_ubatch;
struct llm_graph_context;

class llama_io_read_i;
class llama_io_write_i;

// llm_graph_context::build_attn_mha: the queries of the last tokens of this ubatch go to the ring of layer il
//   q: [n_embd_head_k, n_head, n_tokens], before it is split into streams
void laq_graph_capture(laq_context & laq, const llm_graph_context & gctx, ggml_tensor * q, ggml_tensor * kq_b,
                       ggml_tensor * sinks, float kq_scale, int il);

// llm_graph_context::build_attn_mha: where the tokens attend to the archive, K and V of all tokens stand in place of
// those of the cells
//   k, v: as llama_kv_cache::get_k() and get_v() give them; kq_mask: what this ubatch sees of the cells
void laq_graph_attend(laq_context & laq, const llm_graph_context & gctx, ggml_tensor *& k, ggml_tensor *& v,
                      ggml_tensor *& kq_mask, int il);

// llm_graph_context::build_attn_mha: the outputs go beside the queries, where values are fitted
//   out: [n_embd_head_v*n_head, n_tokens]
void laq_graph_capture_output(laq_context & laq, const llm_graph_context & gctx, ggml_tensor * out, int il);

// llama_context::sched_reserve: a graph that attends computes in the same buffers; throws if there is no memory.
// sampling: backend samplers are set
void laq_graph_reserve(laq_context & laq, bool sampling);

// llama_kv_cache::clear: everything is gone
void laq_kv_clear(laq_context & laq);

// llama_kv_cache::seq_rm with normalized 0 <= p0, p1; seq_id -1 = any. false = it reaches below the intact suffix
bool laq_kv_seq_rm(laq_context & laq, int32_t seq_id, int32_t p0, int32_t p1);

// llama_kv_cache::seq_cp: false = one of the two has been evicted, whose cells cannot be shared
bool laq_kv_seq_cp(const laq_context & laq, int32_t src, int32_t dst);

// llama_kv_cache::seq_cp: a stream takes the place of another. Its rows are copied now
void laq_kv_seq_copied(laq_context & laq, int32_t dst);

// llama_kv_cache::seq_keep: the other sequences are gone
void laq_kv_seq_keep(laq_context & laq, int32_t seq_id);

// llama_kv_cache::seq_add, seq_div: logs an error that names the function; always true
bool laq_kv_refuse(const laq_context & laq, const char * what);

// llama_kv_cache::seq_pos_min: of a sequence that has been evicted, nothing below its intact suffix can be removed. A
// server that looks at the least position then reads a prompt again that differs there.
bool    laq_kv_evicted(const laq_context & laq, int32_t seq_id);
int32_t laq_kv_pos_min(const laq_context & laq, int32_t seq_id);

// llama_kv_cache::prepare: carry out evictions that wait no more. false = one failed, or a ubatch cannot attend:
// laq_last_error() says why, and nothing is decoded
bool laq_kv_prepare(laq_context & laq, const std::vector<llama_ubatch> & ubatches);

// llama_kv_cache::prepare: no cells for the ubatches. Returns whether there are now
bool laq_kv_make_room(laq_context & laq, const std::vector<llama_ubatch> & ubatches);

// llama_kv_cache::state_write, state_read: the tables that go in front of the cells; seq_id -1 = of all sequences
void laq_kv_state_write(const laq_context & laq, llama_io_write_i & io, int32_t seq_id);

// llama_kv_cache::state_read: reads the tables, and takes them over when the cells are there. If it ends before, there may be
// cells without their tables: the sequences are removed.
struct laq_kv_reading {
    laq_kv_reading(laq_context * laq, llama_io_read_i & io, int32_t seq_id);
    ~laq_kv_reading();

    void done();

  private:
    laq_context * laq;  // null: nothing is attached
};

// llama_kv_cache::state_read: whether a cell may have a position
bool laq_kv_position_fits(const laq_context & laq, int32_t pos);
