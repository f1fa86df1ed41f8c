#pragma once

// GGML_OP_CUSTOM in ggml-cuda: what its tables of ops call

struct ggml_backend_cuda_context;
struct ggml_tensor;

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

// false: the node is none of ours, or it has no kernel for this shape
bool ggml_cuda_laq_supported(int device, const ggml_tensor * node);

// false: the node is none of ours
bool ggml_cuda_laq_compute(ggml_backend_cuda_context & ctx, ggml_tensor * node);

#else

// these compile ggml-cuda's sources, but not our kernels
static inline bool ggml_cuda_laq_supported(int, const ggml_tensor *) {
    return false;
}

static inline bool ggml_cuda_laq_compute(ggml_backend_cuda_context &, ggml_tensor *) {
    return false;
}

#endif
