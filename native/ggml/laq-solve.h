#pragma once

#include "ggml.h"

// The systems of a fit, one for each KV head, solved on the CPU in double precision.
// g F32 [m, m, n_head_kv], r F32 [d, m, n_head_kv] -> F32 [m, d, n_head_kv]: (g + ridge I)^-1 r; 0 where there is no
// solution. ridge is read when the graph is computed.
ggml_tensor * laq_solve(ggml_context * ctx, ggml_tensor * g, ggml_tensor * r, const float * ridge);
