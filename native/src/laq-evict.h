#pragma once

// One eviction: score, choose, move, fit. A plan is carried out, or laq_error is thrown and nothing has changed.

#include "laq-select.h"

// order: cells of the sequence in order of position

// Archive the tokens that the plan takes from the intact suffix: from then on some heads may drop them.
void laq_archive_evicted(laq_context & laq, const laq_plan & plan, const std::vector<uint32_t> & order);

// Evict the resident tokens of a sequence that the plan does not keep.
void laq_evict(laq_context & laq, const laq_plan & plan, const std::vector<uint32_t> & order);

// What a recall shares with it:

// keep scores of this eviction for laq_get_scores(), which are columns of `tokens`
void laq_keep_scores(laq_context & laq, const laq_scores & scores, const std::vector<uint32_t> & tokens);

// the last observed queries that values are fitted to: those whose outputs are of all tokens, or not out of date
std::vector<laq_observed> laq_fitted_to(std::vector<laq_observed> observed, bool of_all);

// Move the chosen rows and take over the table. Returns the cells of the chosen tokens. Rows that come from the archive
// are still to be written.
std::vector<uint32_t> laq_settle(laq_context & laq, const laq_plan & plan, const std::vector<uint32_t> & order,
                                 const std::vector<uint8_t> & own, const laq_choice & choice);

// Fit V in the cells `dst` to what the observed queries got. If that cannot be, V stays as it is and a warning is
// logged.
void laq_fit(laq_context & laq, const laq_plan & plan, const std::vector<laq_observed> & observed,
             const std::vector<uint32_t> & dst);
