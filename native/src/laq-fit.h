#pragma once

struct laq_cache;

// let the scheduler plan for the largest graph that fits values
void laq_graph_reserve_fit(laq_cache & laq);
