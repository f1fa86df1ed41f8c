#pragma once

#include "laq.h"

#include "ggml-backend.h"
#include "ggml.h"

// Whether the fused op runs where the keys are. Throws laq_error if it was asked for and does not.
bool laq_score_fused(const ggml_tensor * op, ggml_backend_buffer_type_t buft, laq_score_kernel kernel);

// ggml_laq_score() from existing ops, for backends without the kernel; stores the probabilities of all queries
ggml_tensor * laq_score_composed(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * mask,
                                 ggml_tensor * sinks, float scale, float softcap);
