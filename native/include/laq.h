// laq.h : Lookahead Q-Cache (arXiv 2505.20334) for the KV cache of a llama.cpp context
//
// Make the context with as many cells (llama_context_params::n_ctx) as memory may hold: n_kv_budget tokens and staging
// for what comes next. Nothing more is allocated on devices after laq_attach(). A prompt of any length is read chunk by
// chunk. A sequence is evicted down to n_kv_budget tokens per layer and KV head when its prompt has been read, and when
// the cells are full. With an archive (laq_params::archive) evicted tokens are archived in host memory or a file: the
// tokens of a prompt attend to them as well, and at its end the best of all tokens become resident.
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
//   - a laq_status is returned. On anything but LAQ_STATUS_OK nothing has changed, unless the function says otherwise.
//     laq_last_error() then says what was asked, what is possible and which setting to change
//   - llama_decode() returns 1 where an eviction fails that it needs. Nothing was decoded; laq_last_error() says why
//   - no exception crosses this header
//   - a laq_context belongs to one llama_context and is as thread-safe as that context: not at all
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

#define LAQ_ABI_VERSION 9

struct llama_context;
struct laq_context;
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
};

enum laq_pooling {
    LAQ_POOLING_NONE = 0,
    LAQ_POOLING_MAX  = 1,
    LAQ_POOLING_AVG  = 2,
};

// when archived tokens are recalled; laq_recall() does it at any time
enum laq_recall_when {
    LAQ_RECALL_TURN   = 0,  // when a prompt has been read: at its end, or after the lookahead (DEFERRED)
    LAQ_RECALL_ALWAYS = 1,  // and when decoding finds no cells
};

struct laq_span {
    int32_t p0;  // first position
    int32_t p1;  // one past the last
};

struct laq_params {
    uint32_t size;                 // sizeof(struct laq_params) of the caller
    int32_t  policy;               // enum laq_policy
    int32_t  lookahead;            // enum laq_lookahead
    int32_t  pooling;              // enum laq_pooling
    uint32_t n_ctx;                // positions that a sequence may have; 0 = the cells of the context
    uint32_t n_kv_budget;          // tokens per layer and KV head that stay after an eviction
    uint32_t n_lookahead;          // tokens of the lookahead
    uint32_t n_probe;              // prompt tokens of a probe
    uint32_t n_chunk;              // most prompt tokens between two evictions; 0 = a third of the cells
    uint32_t n_window;             // last prompt tokens: kept whole; their queries score with LAQ_PP
    uint32_t n_window_snapkv;      // the same with SNAPKV
    uint32_t n_sink;               // first positions, always kept
    uint32_t n_kernel;             // pooling width over neighbouring keys, odd
    uint32_t n_follow;             // LAQ, LAQ_PP: in heads that copy, 3/8 of the free cells go to keys
                                   // that follow the best within so many positions; 0 = none do
    uint32_t                seed;  // of RANDOM
    uint32_t                n_pinned;
    const struct laq_span * pinned;          // [n_pinned] positions that are always kept, of every sequence
    float                   value_fit;       // LAQ_PP: ridge of the fit of values; 0 = V stays byte for byte
    int32_t                 archive;         // 1 = evicted tokens are archived, for each sequence
    int32_t                 archive_type;    // enum ggml_type of archived rows; -1 = the cache's, byte for byte
    uint64_t                archive_limit;   // bytes of it in host memory; the oldest tokens then go to a file
    const char *            archive_folder;  // of that file; NULL = none, and the oldest tokens are lost
    int32_t                 recall;          // enum laq_recall_when
};

struct laq_stats {
    uint32_t size;           // sizeof(struct laq_stats) of the caller
    int32_t  n_tokens;       // of the sequence: logical length, last position + 1
    uint32_t n_resident;     // of the sequence: cells in use
    int32_t  n_intact;       // of the sequence: first position from which every head holds every token; 0 = all of them
    int32_t  pending;        // of the sequence: 1 = an eviction waits for its deferred lookahead
    uint32_t n_ctx;          // positions that a sequence may have
    uint32_t n_used;         // cells in use by all sequences
    uint32_t n_cells;        // cells allocated, of all streams
    uint32_t n_layer;        // layers of the KV cache
    uint32_t n_head_kv;      // KV heads of a layer (the largest)
    uint64_t kv_bytes;       // K and V, read back from the backend's buffers
    uint64_t kv_bytes_full;  // what n_ctx cells take
    uint64_t ring_bytes;     // the ring of captured queries and outputs, read back from the backend's buffers
    uint64_t compute_bytes;  // buffers of the model's graphs and of evictions, read back from the schedulers
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
    // the archive of the sequence; a row is K and V of one token in one layer and KV head
    uint64_t     archive_bytes;       // in host memory
    uint64_t     archive_file_bytes;  // in the file
    uint64_t     n_archived;          // rows
    uint64_t     n_recalled;          // rows that became resident again, of all sequences as all below
    uint64_t     n_lost;              // rows that could not be stored or read back
    uint64_t     n_reread;            // tokens of answers that were read again, to attend
    uint64_t     n_attended;          // tokens that attended to the archive
    uint32_t     n_recalls;
    double       ms_recall;  // scores, choice, and rows that become resident
    double       ms_reread;
    uint64_t     bytes_down;  // from the cells to archives
    uint64_t     bytes_up;    // from archives to the cells
    const char * devices;     // that hold K and V, with blanks between them; valid until laq_detach()
    double       ms_fit;      // fits of values, a sum over all evictions
};

uint32_t     laq_abi_version(void);
const char * laq_build_info(void);  // "key=value" pairs separated by blanks: version, llama.cpp commit, backends
const char * laq_status_str(enum laq_status status);
const char * laq_last_error(void);  // of this thread; valid until its next call

struct laq_params laq_default_params(void);

// Attach to a context. What is not a plain KV cache is refused by name: sliding windows, recurrent and hybrid models,
// MLA, M-RoPE, ALiBi, split_mode = tensor. The buffers that evictions need on devices are allocated here and do not
// grow, except by laq_set_params(). env, for tests: LAQ_DEBUG, scores are kept for laq_get_scores(); LAQ_COMPACT =
// graph | host, what moves rows; LAQ_SCORE = composed, no fused kernel; LAQ_CELLS = device, cells in host memory are
// treated as a device's.
enum laq_status laq_attach(struct llama_context * ctx, const struct laq_params * params, struct laq_context ** out);

// Must come right before llama_free(ctx): a token decoded in between would find evicted cells unguarded.
void laq_detach(struct laq_context * laq);

// Other settings in place of those of laq_attach(). Evicted tokens stay evicted. Buffers grow if the new settings need
// larger ones (NO_MEMORY if they cannot). Refused are: another n_ctx or archive; more queries than were allocated for
// (n_window, n_window_snapkv, n_lookahead); a policy that needs queries, or value_fit, where the settings of
// laq_attach() did not; any change while an eviction waits, also of a parked sequence. pinned becomes that of every
// sequence. archive_type, archive_limit and archive_folder stay.
enum laq_status laq_set_params(struct laq_context * laq, const struct laq_params * params);

// Pin spans of one sequence, in place of laq_params::pinned.
enum laq_status laq_set_pinned(struct laq_context * laq, int32_t seq_id, const struct laq_span * spans,
                               uint32_t n_spans);

// Comes before each llama_decode() of a piece of a prompt. tokens [n_tokens] is what is left of the prompt. *n_chunk
// receives how many of them to decode next, in one batch.
// Tokens that were generated since the last prompt are an answer: an eviction that waits for more of it is made first.
// Without an archive: if they find no cells, a probe decides what is evicted. The last n_probe tokens of the prompt and
// at most 8 greedy tokens are decoded, score the cached keys, and are dropped. The logits of the context are then the
// probe's. Policies without lookahead evict by the last tokens decoded.
// With an archive: once something has been evicted the tokens attend to it, at most 128 in one batch (n_ubatch where
// cells are on a device) and in a batch of their own sequence. If the end of the conversation was decoded from the
// cells alone, at most 256 tokens of it are removed and read again first. If that fails, the sequence may end before
// them.
enum laq_status laq_prompt_next(struct laq_context * laq, int32_t seq_id, const int32_t * tokens, uint32_t n_tokens,
                                uint32_t * n_chunk);

// Say that the prompt ends with the last token decoded, whose logits have been computed. Nothing happens while the
// sequence holds no more than the budget and nothing is archived.
// PSEUDO: decodes the lookahead, evicts or recalls, drops the lookahead, and puts the logits of the last token back
// (index -1; the rows before it are gone).
// DEFERRED: llama_decode() evicts or recalls before the token that comes after the first n_lookahead generated tokens.
// Policies without lookahead evict or recall at once.
// If the lookahead fails, no token is lost, and the call may be repeated.
// With an archive and several sequences, or cells on a device, the lookahead is decoded from the cells: the prompt's
// last n_window_snapkv queries first recall as many tokens as find cells beside it.
enum laq_status laq_prompt_end(struct laq_context * laq, int32_t seq_id);

// Carry out an eviction that waits, with the lookahead there is. Nothing waits: OK.
enum laq_status laq_flush(struct laq_context * laq, int32_t seq_id);

// Evict a sequence down to n_keep tokens, scored by the queries of its last n_lookahead tokens. Other sequences stay as
// they are. llama_decode() evicts down to the budget where it finds no cells: the sequence furthest above it first, one
// that reads a prompt for its own tokens alone. Where that is not enough it returns 1, and laq_last_error() is "".
enum laq_status laq_evict(struct laq_context * laq, int32_t seq_id, uint32_t n_keep);

// Recall: by the queries of the last n_lookahead tokens, or of those that an eviction waits for, the best n_kv_budget
// of archived and resident tokens become resident. Without an archive: INVALID_ARGUMENT.
enum laq_status laq_recall(struct laq_context * laq, int32_t seq_id);

// Whether saved states carry archives; at first they do. Tokens that a state does not carry are lost where it is
// loaded.
enum laq_status laq_save_archive(struct laq_context * laq, bool on);

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

// Park a sequence: its cells become free, and it waits in *out until laq_resume(), laq_forget() or laq_detach(). What
// its cells hold is copied to host memory. Its archive is moved, each with an archive_limit of its own. Logits are not
// kept. A sequence without tokens: INVALID_ARGUMENT.
enum laq_status laq_park(struct laq_context * laq, int32_t seq_id, struct laq_parked ** out);

// Put a parked sequence into one that holds no tokens; parked is gone then. Its cells lie side by side: sums over them
// are the same unless some had been removed between others. Pinned spans of a laq_set_params() in between count.
enum laq_status laq_resume(struct laq_context * laq, int32_t seq_id, struct laq_parked * parked);

// Drop a parked sequence.
enum laq_status laq_forget(struct laq_context * laq, struct laq_parked * parked);

enum laq_status laq_get_parked(const struct laq_context * laq, const struct laq_parked * parked,
                               struct laq_parked_info * info);

enum laq_status laq_get_stats(const struct laq_context * laq, int32_t seq_id, struct laq_stats * stats);

// The position of every resident token, sorted: dst [n_layer][n_head_kv][n_resident]; n = elements of dst.
enum laq_status laq_kept_positions(const struct laq_context * laq, int32_t seq_id, int32_t * dst, uint64_t n);

// 1 = a device of ggml (its index) has the fused kernel for keys of a type (enum ggml_type) and a head size; 0 = it has
// not, and scores are composed of other operations there
int32_t laq_device_has_kernel(uint32_t i_device, int32_t type_k, uint32_t n_embd_head);

// LAQ_CDEF_END

#ifdef __cplusplus
}
#endif

#endif  // LAQ_H
