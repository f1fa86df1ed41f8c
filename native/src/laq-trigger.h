#pragma once

// What triggers an eviction: a lookahead that is complete, cells that are full, a call. How a prompt does is in
// laq-read.

#include "laq-recall.h"

// whether an eviction waits for no more tokens
bool laq_is_due(const laq_context & laq, int32_t seq_id);

// Carry out the eviction that waits, with the lookahead there is; archived tokens may become resident. It goes on
// waiting if that fails.
void laq_evict_waiting(laq_context & laq, int32_t seq_id);

// Evict or recall down to n_keep by the queries of the last tokens.
void laq_evict_to(laq_context & laq, int32_t seq_id, uint32_t n_keep, bool recall);

// Tokens that find no cells: of each sequence, and of sequences that are not ours.
struct laq_wanted {
    std::vector<uint32_t> of_seq;  // [n_seq_max]
    uint32_t              of_others = 0;
};

// Evict sequences down to the budget until the tokens find cells, the one furthest above it first. One that reads a
// prompt makes room for itself alone. Returns whether the tokens find cells now; nothing is evicted where they cannot.
bool laq_make_room(laq_context & laq, const laq_wanted & wanted);
