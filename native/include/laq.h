// laq.h : Lookahead Q-Cache (arXiv 2505.20334) for the KV cache of a llama.cpp context
//
// Make the context with as many cells (llama_context_params::n_ctx) as the memory may hold: n_kv_budget tokens and room
// for what comes next. Whatever is decoded then, nothing more is allocated: a prompt of any length is read chunk by
// chunk, and each sequence comes down to n_kv_budget tokens per layer and KV head when its prompt has been read and
// whenever the cells are full. With an archive (laq_params::archive) what goes is kept outside of the device's memory, and
// chosen from again.
//
//     for (uint32_t i = 0, n; i < n_prompt; i += n) {
//         laq_prompt_next(laq, 0, prompt + i, n_prompt - i, &n);
//         llama_decode(ctx, llama_batch_get_one(prompt + i, n));
//     }
//     laq_prompt_end(laq, 0);
//     ... llama_decode() token by token, as without laq.h
//
// Everything is exported by libllama. C99, no includes besides the two below, readable by cffi: the text
// between LAQ_CDEF_BEGIN and LAQ_CDEF_END is what the Python binding is generated from.
//
// Rules that hold for every function:
//   - a laq_status is returned; on anything but LAQ_STATUS_OK laq_last_error() says what was asked, what is
//     possible and which setting to change, and the context is as usable as before the call
//   - no exception crosses this header
//   - a laq_cache belongs to one llama_context and is as thread-safe as that context: not at all
#ifndef LAQ_H
#define LAQ_H

#include <stdbool.h>
#include <stdint.h>

#if defined(_WIN32)
#    define LAQ_API __declspec(dllexport)
#else
#    define LAQ_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// LAQ_CDEF_BEGIN

#define LAQ_ABI_VERSION 8

struct llama_context;
struct laq_cache;
struct laq_parked;

enum laq_status {
    LAQ_STATUS_OK               = 0,
    LAQ_STATUS_INVALID_ARGUMENT = 1,  // a parameter is out of range
    LAQ_STATUS_UNSUPPORTED      = 2,  // this kind of model or context cannot be evicted
    LAQ_STATUS_NO_MEMORY        = 3,  // a buffer could not be allocated
    LAQ_STATUS_COMPUTE_FAILED   = 4,  // a graph could not be computed, or was aborted
    LAQ_STATUS_INTERNAL         = 5,
};

// what the scores of the cached keys are made from
enum laq_policy {
    LAQ_POLICY_FULL      = 0,  // never evict
    LAQ_POLICY_LAQ       = 1,  // attention of the lookahead queries (if there is none yet: as LAQ_PP)
    LAQ_POLICY_LAQ_PP    = 2,  // attention of the lookahead queries and of the last n_window prompt queries
    LAQ_POLICY_SNAPKV    = 3,  // attention of the last n_window_snapkv prompt queries (arXiv 2404.14469)
    LAQ_POLICY_STREAMING = 4,  // sinks and the most recent tokens (arXiv 2309.17453)
    LAQ_POLICY_RANDOM    = 5,
};

// where the lookahead queries come from
enum laq_lookahead {
    LAQ_LOOKAHEAD_DEFERRED = 0,  // the first n_lookahead tokens that are really generated; evict when they are there
    LAQ_LOOKAHEAD_PSEUDO   = 1,  // n_lookahead greedy tokens, decoded and dropped before the first one is sampled
    // n_lookahead newlines (token 0 in a vocabulary without one), decoded in one pass and dropped as PSEUDO's are: their
    // queries know where an answer will stand and nothing of what it says (as arXiv 2603.11564)
    LAQ_LOOKAHEAD_POSITION = 2,
};

// which cache the pseudo tokens are generated from
enum laq_draft {
    LAQ_DRAFT_FULL   = 0,  // all of it
    LAQ_DRAFT_SNAPKV = 1,  // cut to the budget by SnapKV first, as in the paper; the full cache waits in host memory
};

enum laq_pooling {
    LAQ_POOLING_NONE = 0,
    LAQ_POOLING_MAX  = 1,
    LAQ_POOLING_AVG  = 2,
};

enum laq_score_kernel {
    LAQ_SCORE_KERNEL_AUTO     = 0,  // fused where the backend has it
    LAQ_SCORE_KERNEL_FUSED    = 1,
    LAQ_SCORE_KERNEL_COMPOSED = 2,  // mul_mat, soft_max_ext, sum_rows
};

// when tokens that left the cells are chosen from again
enum laq_recall_when {
    LAQ_RECALL_NEVER = 0,  // by laq_recall() alone
    LAQ_RECALL_TURN  = 1,  // once a prompt has been read: at its end, or with the first tokens of the answer (DEFERRED)
    LAQ_RECALL_ALWAYS = 2,  // and whenever decoding finds no cells
};

// where archived and resident tokens are scored together
enum laq_recall_device {
    LAQ_RECALL_ON_AUTO   = 0,  // the faster one of those two with a sample of keys
    LAQ_RECALL_ON_CPU    = 1,
    LAQ_RECALL_ON_DEVICE = 2,  // of the layer's cache: through a buffer for n_ctx keys of one KV head
};

// in view of what a prompt is read, and tokens that are looked ahead from its end, once something has left the cells
enum laq_recall_read {
    LAQ_RECALL_READ_AUTO    = 0,  // ARCHIVE where all layers' cells are in host memory, CELLS otherwise
    LAQ_RECALL_READ_ARCHIVE = 1,  // of the cells and the archive, by the model's own attention
    LAQ_RECALL_READ_CELLS   = 2,
    LAQ_RECALL_READ_PROMPT  = 3,  // ARCHIVE while it is read; looked ahead from what its last queries choose
};

struct laq_span {
    int32_t p0;  // first position
    int32_t p1;  // one past the last
};

struct laq_params {
    uint32_t size;                 // sizeof(struct laq_params) of the caller
    int32_t  policy;               // enum laq_policy
    int32_t  lookahead;            // enum laq_lookahead
    int32_t  draft;                // enum laq_draft
    int32_t  pooling;              // enum laq_pooling
    int32_t  score_kernel;         // enum laq_score_kernel
    uint32_t n_ctx;                // positions that a sequence may have; 0 = the cells of the context
    uint32_t n_kv_budget;          // tokens per layer and KV head that stay when the prompt has been read
    uint32_t n_lookahead;          // tokens decoded ahead
    uint32_t n_probe;              // last prompt tokens that are decoded ahead where a prompt finds no cells
    uint32_t n_chunk;              // most prompt tokens read between two evictions; 0 = a third of the cells
    uint32_t n_window;             // last prompt tokens: kept whole, and their queries are used by LAQ_PP
    uint32_t n_window_snapkv;      // the same for SNAPKV
    uint32_t n_sink;               // first positions, always kept
    uint32_t n_kernel;             // pooling width over neighbouring keys, odd
    uint32_t n_follow;             // LAQ, LAQ_PP: in heads that copy, 3/8 of the free cells go to keys
                                   // that follow the best within so many positions; 0 = none do
    uint32_t                seed;  // for RANDOM
    uint32_t                n_pinned;
    const struct laq_span * pinned;  // [n_pinned] positions that are always kept, of every sequence
    // The archive: K and V of every token before its cells are freed, outside of the device's memory.
    int32_t      archive;         // 1 = there is one
    int32_t      archive_type;    // enum ggml_type of its rows; -1 = as in the cache, byte for byte
    uint64_t     archive_limit;   // bytes of it in host memory; the oldest tokens then go to a file
    const char * archive_folder;  // of that file; NULL = there is none, and the oldest tokens are lost
    int32_t      recall;          // enum laq_recall_when
    // times that a message selects by its own queries and is read again, before the policy selects: as many tokens as
    // there are cells for, and the lookahead from them. 0: nor are the parts of a prompt that finds no cells
    uint32_t n_recall_rounds;
    int32_t  recall_device;  // enum laq_recall_device
    int32_t  recall_read;    // enum laq_recall_read
    float    value_fit;      // LAQ_PP: ridge of the fit of V of the tokens that stay to the outputs that the observed
                             // queries had; 0 = V stays byte for byte. The archive has it as it was, and where the
                             // CPU scores it, the outputs are those of archived and resident tokens together
    uint32_t n_reread;       // tokens at the end of a conversation, the last reply among them, that are read again
                             // with what a message has selected, at most; a quarter of the budget if that is less
};

struct laq_stats {
    uint32_t size;           // sizeof(struct laq_stats) of the caller
    int32_t  n_tokens;       // of the sequence: logical length, last position + 1
    uint32_t n_resident;     // of the sequence: cells in use
    int32_t  n_intact;       // of the sequence: first position from which every head holds every token; 0 = all of them
    int32_t  pending;        // of the sequence: 1 = an eviction waits for its lookahead queries
    uint32_t n_ctx;          // positions that a sequence may have
    uint32_t n_used;         // cells in use by all sequences
    uint32_t n_cells;        // cells allocated
    uint32_t n_layer;        // layers of the KV cache
    uint32_t n_head_kv;      // KV heads of a layer (the largest)
    uint64_t kv_bytes;       // K and V, read back from the backend's buffers
    uint64_t kv_bytes_full;  // what n_ctx cells take
    uint64_t ring_bytes;     // the ring of captured queries and outputs, read back from the backend's buffers
    uint64_t compute_bytes;  // the graphs' buffers, evictions included, read back from the scheduler
    uint64_t n_decoded;      // tokens decoded, probe and pseudo tokens included
    uint64_t n_probe;        // probe tokens decoded and dropped
    uint64_t n_pseudo;       // pseudo tokens decoded and dropped
    uint32_t n_evictions;
    int32_t  score_fused;   // 1 = the fused kernel scores in all layers
    double   ms_probe;      // sums over all evictions, milliseconds
    double   ms_lookahead;  // pseudo tokens
    double   ms_score;
    double   ms_select;
    double   ms_compact;
    int32_t  compact_graph;  // 1 = K and V are moved by a graph on their device, 0 = by the host
    // the archive; a row is K and V of one token in one layer and KV head
    uint64_t archive_bytes;       // in host memory
    uint64_t archive_file_bytes;  // in the file
    uint64_t n_archived;          // rows that are archived now
    uint64_t n_recalled;          // rows that came back
    uint64_t n_lost;              // rows that could not be kept or read back
    uint64_t n_reread;            // tokens that were decoded again: after a re-selection, or of an answer
    uint64_t n_attended;          // tokens decoded in view of the archive as well
    uint32_t n_recalls;           // re-selections
    uint32_t n_recalls_skipped;   // where the selection would hardly have changed
    double   ms_recall;           // re-selections: scores, choice, and what comes back
    double   ms_reread;           // tokens decoded again after them
    uint64_t bytes_down;          // from the cells to the archive
    uint64_t bytes_up;
    uint64_t recall_bytes;      // the buffers for it on devices, read back from the backend's; fixed as all others
    double   ms_recall_cpu;     // scoring a sample of keys of one KV head, 0 = nothing was measured
    double   ms_recall_device;  // the same on the device (the slowest one), the way there included
    // texts, valid until laq_detach()
    const char * devices;           // that hold K and V, with blanks between them
    const char * score_reason;      // why that kernel scores; "" if nothing is scored
    const char * compact_reason;    // why that one moves
    const char * recall_scored_on;  // devices that score the archive, with blanks between them; "" if there is none
    const char * recall_reason;     // why those
    double       ms_fit;            // fits of values, a sum over all evictions
};

uint32_t     laq_abi_version(void);
const char * laq_build_info(void);  // "key=value" pairs separated by blanks: version, llama.cpp commit, backends
const char * laq_status_str(enum laq_status status);
const char * laq_last_error(void);  // of this thread; valid until its next call

struct laq_params laq_default_params(void);

// Attach to a context. Anything but a plain KV cache (RoPE, no sliding window, no ALiBi, one stream) is refused by name.
// The buffers that evictions need are allocated here and never grow.
enum laq_status laq_attach(struct llama_context * ctx, const struct laq_params * params, struct laq_cache ** out);

// Must come right before llama_free(ctx): nothing may be decoded in between, since nothing would guard the evicted
// cells.
void laq_detach(struct laq_cache * laq);

// Other settings from now on, in place of those of laq_attach(). What was evicted stays so, and nothing is allocated:
// refused are another n_ctx, score_kernel or archive, more queries than were allocated for (n_window, n_window_snapkv,
// n_lookahead), a policy that needs queries where the one of laq_attach() needed none, and any change while an eviction
// waits, that of a parked sequence included. pinned is that of every sequence; type, limit and folder of the archive and
// where it is scored stay.
enum laq_status laq_set_params(struct laq_cache * laq, const struct laq_params * params);

// What is pinned in one sequence from now on, in place of laq_params::pinned.
enum laq_status laq_set_pinned(struct laq_cache * laq, int32_t seq_id, const struct laq_span * spans, uint32_t n_spans);

// Comes before each llama_decode() of a piece of a prompt. tokens [n_tokens] is all that is left of the prompt; *n_chunk
// receives how many of them to decode next, in one batch. If they would find no cells, what they need is evicted: the
// last n_probe tokens of the prompt and at most 8 greedy ones after them (n_lookahead, if that is less) are decoded behind
// what is cached, score it, and are dropped again (policies without lookahead: no such probe). Where values are fitted to
// an archive there is no probe: the tokens decoded last choose from all tokens and are decoded again (n_recall_rounds). If
// that fails, the sequence may end before them. With LAQ_RECALL_READ_ARCHIVE there is neither: what is decoded until the
// eviction of laq_prompt_end() attends to the archive as well, at most 128 tokens at once (n_ubatch where cells are on a
// device), and of an answer that did not the last n_reread tokens are decoded again first; so it is with
// LAQ_RECALL_READ_PROMPT until laq_prompt_end(). The logits of the context are then those of the probe, or of these tokens.
enum laq_status laq_prompt_next(struct laq_cache * laq, int32_t seq_id, const int32_t * tokens, uint32_t n_tokens,
                                uint32_t * n_chunk);

// Say that the prompt ends with the last token decoded and that its logits have been computed.
// PSEUDO: decodes ahead, evicts, restores the logits of the last token (index -1; the rows before it are gone).
// DEFERRED: llama_decode() evicts before the token that comes after the first n_lookahead generated ones.
// Policies that need no lookahead evict at once.
// Nothing happens while the sequence holds no more than the budget.
enum laq_status laq_prompt_end(struct laq_cache * laq, int32_t seq_id);

// Carry out an eviction that waits, with the lookahead queries there are. Nothing waits: OK.
enum laq_status laq_flush(struct laq_cache * laq, int32_t seq_id);

// Evict a sequence down to n_keep tokens now, scored by the queries of its last n_lookahead tokens; other sequences stay
// as they are. llama_decode() does the same down to the budget when it finds no cells; where that fails it returns 1 and
// laq_last_error() says why ("": nothing more can be evicted).
enum laq_status laq_evict(struct laq_cache * laq, int32_t seq_id, uint32_t n_keep);

// Choose again from all tokens, archived and resident, with the queries of the last n_lookahead tokens (or of those that
// an eviction waits for): the best n_kv_budget become resident. Without an archive: INVALID_ARGUMENT.
enum laq_status laq_recall(struct laq_cache * laq, int32_t seq_id);

// Whether saved states carry the archive (they do at first). One that does not: what it leaves out is lost.
enum laq_status laq_save_archive(struct laq_cache * laq, bool on);

//
// parked sequences
//

struct laq_parked_info {
    uint32_t size;        // sizeof(struct laq_parked_info) of the caller
    int32_t  n_tokens;    // as laq_stats has it
    uint32_t n_resident;  // cells that it needs to be resumed
    int32_t  pending;     // 1 = an eviction waits for its lookahead queries
    uint64_t bytes;       // in host memory, its archive included
    uint64_t file_bytes;  // of its archive, in its file
};

// Take a sequence out of the cells, which become free, and hold it in *out until laq_resume(), laq_forget() or
// laq_detach(). What its cells hold goes to host memory. Its archive is not copied: it stays in memory or in its file,
// each one with an archive_limit of its own. Logits are not kept. A sequence without tokens: INVALID_ARGUMENT.
enum laq_status laq_park(struct laq_cache * laq, int32_t seq_id, struct laq_parked ** out);

// Put it, as it was, into a sequence that holds no tokens; parked is gone then. Its cells come to lie side by side: sums
// over them are the same unless some had been removed between others. Of pinned and of scores that are
// remembered, those of a laq_set_params() in between count.
enum laq_status laq_resume(struct laq_cache * laq, int32_t seq_id, struct laq_parked * parked);

// Drop it.
enum laq_status laq_forget(struct laq_cache * laq, struct laq_parked * parked);

enum laq_status laq_get_parked(const struct laq_cache * laq, const struct laq_parked * parked,
                               struct laq_parked_info * info);

enum laq_status laq_get_stats(const struct laq_cache * laq, int32_t seq_id, struct laq_stats * stats);

// The position of every resident token, sorted: dst [n_layer][n_head_kv][n_resident]; n = elements of dst.
enum laq_status laq_kept_positions(const struct laq_cache * laq, int32_t seq_id, int32_t * dst, uint64_t n);

//
// inspection and tests
//

struct laq_layer_info {
    uint32_t size;
    int32_t  il;  // layer of the model
    uint32_t n_head;
    uint32_t n_head_kv;
    uint32_t n_embd_head_k;
    uint32_t n_queries;  // captured queries of sequence 0 that are valid now
    float    kq_scale;
    float    softcap;  // 0 = none
};

enum laq_status laq_get_layer_info(const struct laq_cache * laq, uint32_t ikv, struct laq_layer_info * info);

// captured queries of sequence 0 in a layer, oldest first: pos [n_queries], dst F32 [n_queries][n_head][n_embd_head_k]
enum laq_status laq_get_queries(const struct laq_cache * laq, uint32_t ikv, int32_t * pos, float * dst, uint64_t n);

// resident keys of sequence 0 in a layer as F32, in the order of laq_kept_positions: dst [n_resident][n_head_kv][n_embd_head_k]
enum laq_status laq_get_keys(const struct laq_cache * laq, uint32_t ikv, float * dst, uint64_t n);

// rows of K or V of sequence 0 in a layer and KV head, as they are stored and in the order of laq_kept_positions:
// dst [n_resident][bytes of a row]
enum laq_status laq_get_rows(const struct laq_cache * laq, uint32_t ikv, uint32_t head, bool is_v, uint8_t * dst,
                             uint64_t n);

// *held: whether a position is archived; then dst [n] receives its row of K or V as the archive stores it, if not NULL
enum laq_status laq_get_archived(struct laq_cache * laq, uint32_t ikv, uint32_t head, bool is_v, int32_t pos,
                                 uint8_t * dst, uint64_t n, bool * held);

// scores (before pooling) of one of the last 8 evictions, i_eviction of n_evictions: dst F32 [n_head_kv][n_kv]; *n_kv receives the length. One for each
// token of the sequence that was resident then, in order of position, probe and pseudo tokens included; for each token
// that some head could choose where that was from the archive, too, 0 in the others. dst may be NULL to ask for n_kv.
// Kept only if LAQ_DEBUG is set in the environment before laq_attach().
enum laq_status laq_get_scores(const struct laq_cache * laq, uint32_t i_eviction, uint32_t ikv, float * dst, uint64_t n,
                               uint32_t * n_kv);

// 1 = a device of ggml (its index) has the fused kernel for keys of a type (enum ggml_type) and a head size; 0 = it has not,
// and scores are composed of other operations there
int32_t laq_device_has_kernel(uint32_t i_device, int32_t type_k, uint32_t n_embd_head);

struct laq_score_args {
    uint32_t      size;
    int32_t       type_k;       // enum ggml_type
    uint32_t      n_embd_head;  // d
    uint32_t      n_queries;
    uint32_t      n_head;
    uint32_t      n_head_kv;
    uint32_t      n_kv;
    int32_t       score_kernel;  // enum laq_score_kernel
    int32_t       n_threads;
    float         scale;
    float         softcap;
    const float * q;       // [n_head][n_queries][d]
    const void *  k;       // rows of type_k: [n_kv][n_head_kv][d]
    const float * mask;    // [n_queries][n_kv] added to the scaled logits, or NULL
    const float * sinks;   // [n_head], or NULL
    const char *  device;  // as ggml_backend_dev_name() has it; NULL = the CPU
};

// The score op alone: dst F32 [n_head_kv][n_kv], the mean over the heads of a group of the
// attention that the queries pay to each key, summed over the queries.
enum laq_status laq_score(const struct laq_score_args * args, float * dst);

// Milliseconds that the keys of one KV head (n_head_kv = 1) take where recall scores them: on the CPU, or on another device
// that they go to from host memory. Of args, sizes, type, threads and device are used. No kernel: UNSUPPORTED.
enum laq_status laq_time_score(const struct laq_score_args * args, double * ms);

// The selection alone, of keys sorted by position: indices of the kept ones, ascending, dst [min(n_kv, n_kv_budget)];
// *n_kept receives the count. pinned [n_kv] (0 or 1) is kept first, then by rank; equal ranks: the lower index wins.
// Of params, the policy (one that attends), n_kv_budget, pooling, n_kernel and n_follow are used.
enum laq_status laq_select(const struct laq_params * params, const int32_t * pos, const float * scores,
                           const uint8_t * pinned, uint32_t n_kv, uint32_t * dst, uint32_t * n_kept);

struct laq_chunk {
    uint32_t n_tokens;  // decode so many next; 0 = there is no room, and none can be made
    uint32_t n_evict;   // evict so many first
    uint32_t n_probe;   // scored by so many of the prompt's last tokens
};

// How a prompt goes on, without doing it: n_used cells of n_cells are in use, n_resident of them by the sequence itself,
// n_left tokens of the prompt are not decoded yet. Of params, the policy, n_kv_budget, n_lookahead, n_probe and n_chunk
// (here 0 = n_batch) are used.
struct laq_chunk laq_plan_chunk(const struct laq_params * params, uint32_t n_cells, uint32_t n_used,
                                uint32_t n_resident, uint32_t n_left, uint32_t n_batch);

// score of the RANDOM policy: the same on every machine, in [0, 1)
float laq_random_score(uint32_t seed, uint32_t ikv, uint32_t head, int32_t pos);

// LAQ_CDEF_END

#ifdef __cplusplus
}
#endif

#endif  // LAQ_H
