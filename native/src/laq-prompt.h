#pragma once

#include <cstdint>

struct laq_cache;

// laq_prompt_next(): makes room for the next tokens of a prompt and returns how many to decode; before that the last ones
// may be read again. Throws laq_error; the cache then holds what it held, less what was being read again.
uint32_t laq_read_on(laq_cache & laq, int32_t seq_id, const int32_t * tokens, uint32_t n_tokens);

// The paper's lookahead pass (arXiv 2505.20334, section 3): decode n_lookahead greedy tokens, evict by their queries,
// drop them, and put the prompt's last logits back; twice for a message that probes have read and that was `drafted`. With
// an archive the last tokens are then read again, unless they were drafted. Throws laq_error; the cache and the archive
// then hold the whole prompt still.
void laq_evict_by_pseudo(laq_cache & laq, int32_t seq_id, bool drafted, bool probed);

// A message was read while what it looks at may not have been there, and so was the answer before it: n_recall_rounds
// times, once more where probes have read it, the last tokens select by their own queries what is looked ahead from, and
// both are read again. Nothing is where they were read in view of the archive. Returns whether anything came back, or all of
// it was there. Throws laq_error.
bool laq_recall_for_message(laq_cache & laq, int32_t seq_id, bool probed);
