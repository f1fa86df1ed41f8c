#pragma once

// Reading prompts, and looking ahead from their end: the only file that calls llama_decode().

#include "laq-trigger.h"

// laq_prompt_next(): make room for the next tokens of a prompt; returns how many to decode in one batch. Throws
// laq_error; the sequence then holds what it held, less what was being read again.
uint32_t laq_read_next(laq_context & laq, int32_t seq_id, const int32_t * tokens, uint32_t n_tokens);

// laq_prompt_end(): the prompt is read. Evict, recall, or wait for the deferred lookahead. Throws laq_error; the
// sequence then holds the whole prompt.
void laq_read_end(laq_context & laq, int32_t seq_id);
