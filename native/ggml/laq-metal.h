#pragma once

// GGML_OP_CUSTOM in ggml-metal: what its tables of ops call

#include "ggml-metal-device.h"

#ifdef __cplusplus
extern "C" {
#endif

// false: the node is none of ours, or it has no kernel for this shape
bool ggml_metal_laq_supported(const struct ggml_tensor * node, const struct ggml_metal_device_props * props);

// bytes after the result for what one kernel leaves for the next
size_t ggml_metal_laq_extra(const struct ggml_tensor * node);

void ggml_metal_laq_encode(ggml_metal_library_t lib, ggml_metal_encoder_t enc, const struct ggml_tensor * node);

#ifdef __cplusplus
}
#endif
