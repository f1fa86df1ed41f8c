#pragma once

struct laq_cache;

// The paper's lookahead pass (arXiv 2505.20334, section 3): decode n_lookahead greedy tokens, evict by their queries,
// drop them, and put the prompt's last logits back. Throws laq_error; the cache then holds the whole prompt still.
void laq_evict_by_pseudo(laq_cache & laq);
