#pragma once

// GGML_OP_LAQ_SCORE in ggml-metal: what its tables of ops call

#include "ggml-metal-device.h"

#ifdef __cplusplus
extern "C" {
#endif

// false: the op is composed from others
bool ggml_metal_laq_score_supported(const struct ggml_tensor * op, const struct ggml_metal_device_props * props);

// bytes after the result for what one kernel leaves for the next
size_t ggml_metal_laq_score_extra(const struct ggml_tensor * op);

void ggml_metal_laq_score_encode(ggml_metal_library_t lib, ggml_metal_encoder_t enc, const struct ggml_tensor * op);

#ifdef __cplusplus
}
#endif
