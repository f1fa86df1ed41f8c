#pragma once

// Recall: tokens that left the cells are kept outside of the device's memory and chosen from again. Internal to libllama.

#include "laq-archive.h"
#include "laq-cache.h"
#include "laq-move.h"
#include "laq-recall-score.h"

// Of a selection's rows so many must be new, in the first layers, or nothing is brought back.
constexpr double   LAQ_RECALL_NEW    = 0.02;
constexpr uint32_t LAQ_RECALL_LAYERS = 4;

// the archive of the one sequence that a context with an archive has
struct laq_recall_state {
    ggml_type         type[2];  // of archived K and V
    laq_archive       archive;
    laq_recall_scorer scorer;
    laq_host_buffer   fetched;         // K or V of a layer
    laq_host_buffer   fetched_values;  // V, where K is looked at beside it

    // the last tokens decoded: that of position p is in slot p % n
    std::vector<int32_t>     pos;
    std::vector<llama_token> token;

    // throws laq_error
    explicit laq_recall_state(const laq_cache & laq);

    // archived and resident K (part 0) or V are one set: they have the cache's type, or both become F32
    ggml_type row_type(const laq_cache & laq, int part) const;

    // what is decoded, but for a probe
    void note(const llama_ubatch & ubatch);
    void forget(int32_t p0);  // positions from p0 on

    // the last tokens before n_prompt, at most n_most: those that every head holds and that are known
    std::vector<llama_token> tail(const laq_cache & laq, int32_t seq_id, int32_t n_prompt, uint32_t n_most) const;
};

// cells of `order` in which a head holds a token that is archived
uint32_t laq_n_archived(const laq_cache & laq, int32_t seq_id, uint32_t ikv, uint32_t h,
                        const std::vector<uint32_t> & order);

// Whether every head holds all that is archived: what queries get from the cells is what they get from all tokens then.
bool laq_holds_archive(const laq_cache & laq, int32_t seq_id, const std::vector<uint32_t> & order);

// Archive the tokens that every head holds so far and that an eviction lets go. What finds no memory is lost.
void laq_archive_leaving(laq_cache & laq, const laq_eviction & e, const std::vector<uint32_t> & order);

// n values of one type as values of another
void laq_convert(ggml_type from, const uint8_t * src, ggml_type to, uint8_t * dst, int64_t n);

// K (part 0) or V (part 1) of a layer in the cache, and how many values a head of it has
const ggml_tensor * laq_part_of(const laq_cache & laq, uint32_t ikv, int part);
int64_t             laq_n_embd_of(const laq_cache & laq, uint32_t ikv, int part);
