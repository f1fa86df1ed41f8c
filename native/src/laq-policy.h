#pragma once

// Pure functions on plain arrays: which keys stay. No ggml, no llama.
// Reference: laq_gguf/reference/select.py; the two agree exactly.

#include "laq-test.h"

#include <cstdint>
#include <vector>

// smooth scores over neighbouring keys, in place of nothing: dst [n] = pool(src [n])
//   max: the window is clipped at the ends
//   avg: zero padding, float32 sums from left to right, divided by n_kernel
void laq_pool(const float * src, float * dst, uint32_t n, uint32_t n_kernel, laq_pooling pooling);

// dst [n] = the highest of src [n] at the positions pos[i] - n_follow .. pos[i]; pos ascending, not in place
void laq_follow(const float * src, const int32_t * pos, float * dst, uint32_t n, uint32_t n_follow);

// A head copies when its best key has this share of the attention to keys that are not pinned [n]: one key per query,
// as when a text is read word for word. scores [n] raw
constexpr double LAQ_COPY_SHARE = 0.07;
bool             laq_copies(const float * scores, const uint8_t * pinned, uint32_t n);

// indices of the kept keys, ascending
//   pinned [n]: 1 = kept before anything else
//   then the best by score, equal scores: the lower index
std::vector<uint32_t> laq_top(const float * scores, const uint8_t * pinned, uint32_t n, uint32_t n_budget);

// what is known of the tokens that one KV head holds, sorted by position
struct laq_head_view {
    const int32_t * pos;     // [n]
    const float *   scores;  // [n] raw, or NULL for policies that need none
    uint32_t        n;
    int32_t         n_intact;  // positions from here on are kept whole
};

// what the keys of one KV head are ranked by: [n]
//   pinned [n]: kept anyway, their scores count as 0 and do not lift their neighbours
std::vector<float> laq_rank(const laq_params & params, uint32_t ikv, uint32_t head, const laq_head_view & view,
                            const uint8_t * pinned);

// The selection given what is pinned [n]: indices into view, ascending. Where a head copies, the policies that look
// ahead give 3/8 of the cells that are not pinned to what follows the best keys within n_follow positions.
std::vector<uint32_t> laq_select_keys(const laq_params & params, uint32_t ikv, uint32_t head,
                                      const laq_head_view & view, const uint8_t * pinned);

// what no eviction may free: sinks, pinned spans, positions from n_intact on
std::vector<uint8_t> laq_pinned(const laq_params & params, const laq_head_view & view);

// positions [first, last) whose queries score the keys; n_end: one past the last position decoded
struct laq_query_range {
    int32_t first;
    int32_t last;
};

laq_query_range laq_policy_queries(const laq_params & params, int32_t n_prompt, int32_t n_end);

// last prompt tokens that are kept whole
uint32_t laq_policy_window(const laq_params & params);

bool laq_policy_needs_queries(const laq_params & params);
bool laq_policy_needs_lookahead(const laq_params & params);

// Values are fitted to so many observed queries at most.
constexpr uint32_t LAQ_FIT_QUERIES = 32;

// whether an eviction fits the values of what stays
bool laq_policy_fits(const laq_params & params);

// Tokens of an answer that are read again before the next prompt, at most.
constexpr uint32_t LAQ_REREAD = 256;

// Tokens that attend at once where the cells are in host memory.
constexpr uint32_t LAQ_ATTEND = 128;

// Tokens of the lookahead. A probe looks ahead no further than LAQ_PROBE_AHEAD, since there is one before each
// eviction.
constexpr uint32_t LAQ_PROBE_AHEAD = 8;
uint32_t           laq_policy_ahead(const laq_params & params);
uint32_t           laq_policy_probe_ahead(const laq_params & params);

// cells that stay free while a prompt is read: for a probe, and for the lookahead from its end
uint32_t laq_policy_room(const laq_params & params);

// Most tokens of a chunk where n_chunk is 0: a third of the cells that no probe needs. Larger chunks need fewer
// evictions, but each cuts deeper into what has been read.
uint32_t laq_policy_chunk(const laq_params & params, uint32_t n_cells);

// cells that no eviction frees: the union of sinks, window, lookahead and pinned spans
uint32_t laq_policy_n_pinned(const laq_params & params);

// How a prompt goes on where there is an archive: its next tokens attend. All evicted tokens are in view, so one
// eviction goes down to the budget.
struct laq_attending {
    uint32_t n_cells;     // of the sequence's stream
    uint32_t n_used;      // of these
    uint32_t n_resident;  // of the sequence
    uint32_t n_left;      // tokens of the prompt
    uint32_t n_batch;     // most tokens of a batch
    uint32_t n_attend;    // most tokens that attend at once
    bool     evicted;     // the sequence has archived tokens
};

laq_chunk laq_plan_attending(const laq_params & params, const laq_attending & now);

// Tokens that are recalled for a lookahead: as many as find cells beside it, and no fewer than the budget. n_room:
// cells that the sequence can have
uint32_t laq_policy_beside_ahead(const laq_params & params, uint32_t n_room);
