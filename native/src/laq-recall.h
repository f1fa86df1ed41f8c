#pragma once

// One recall: archived and resident tokens are scored as one set of keys, and the best of all become resident.

#include "laq-evict.h"

// Carry out a plan: a recall if it asks for one and a query observes, an eviction otherwise. What the plan takes from
// the intact suffix is archived first. Throws laq_error; then no token has become lost, and the cells are as before.
void laq_carry_out(laq_context & laq, const laq_plan & plan);
