#pragma once

// Which tokens stay: from scores to a choice for every head of every layer.

#include "laq-context.h"

// What one eviction or recall does.
struct laq_plan {
    int32_t         seq_id;
    uint32_t        n_keep;            // tokens per layer and KV head that stay
    int32_t         n_intact;          // positions from here on are kept whole
    int32_t         n_end;             // tokens from here on were decoded ahead and are dropped
    laq_query_range queries  = {};     // positions whose captured queries observe; none: the newest tokens stay
    bool            by_probe = false;  // they are in the ring of probes
    bool            recall   = false;  // archived tokens may become resident
};

// tokens that were not decoded ahead. order: cells in order of position
uint32_t laq_n_before_end(const laq_context & laq, const laq_plan & plan, const std::vector<uint32_t> & order);

// a token that a head holds
struct laq_held {
    int32_t pos;
    int32_t cell;
};

// what a head holds in cells, in order of position
std::vector<laq_held> laq_held_by(const laq_context & laq, int32_t seq_id, uint32_t head,
                                  const std::vector<uint32_t> & cells);

// Indices into view of what stays of one head, beside n_shared cells that other sequences have. Throws laq_error if
// more are pinned than stay.
std::vector<uint32_t> laq_keep_of_head(const laq_params & params, uint32_t ikv, uint32_t h, const laq_head_view & view,
                                       uint32_t n_shared);

// Of the resident tokens in `order`, before n_end and not shared: the tokens that stay. scores: a column for each
// cell, or none. Throws laq_error.
laq_choice laq_choose_resident(const laq_context & laq, const laq_plan & plan, const std::vector<uint32_t> & order,
                               const std::vector<uint8_t> & own, const laq_scores & scores);

// behind what stays, the tokens from n_end on, in every head
void laq_choose_ahead(const laq_context & laq, const laq_plan & plan, const std::vector<uint32_t> & order,
                      laq_choice & choice);
