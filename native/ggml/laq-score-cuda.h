#pragma once

// GGML_OP_LAQ_SCORE for ggml-cuda

struct ggml_backend_cuda_context;
struct ggml_tensor;

bool ggml_cuda_laq_score_supported(int device, const ggml_tensor * op);

void ggml_cuda_laq_score(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
