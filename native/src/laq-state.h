#pragma once

// Saved states of one sequence in memory. The hooks of states are in laq-hooks.h.

#include "laq-context.h"

// What is in the cells of a sequence, as a saved state without the archive. Throws laq_error.
std::vector<uint8_t> laq_state_of_cells(laq_context & laq, int32_t seq_id);

// The same into an empty sequence. Throws laq_error; the sequence is empty then.
void laq_set_state_of_cells(laq_context & laq, int32_t seq_id, const std::vector<uint8_t> & state);
