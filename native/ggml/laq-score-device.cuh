#pragma once

// What the score kernels need of the GPU, one inline function each: tests/emulation has the same for a CPU.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define LAQ_DEVICE       static __device__ __forceinline__
#define LAQ_INLINE       __device__ __forceinline__
#define LAQ_HOST_DEVICE  __host__ __device__ __forceinline__
#define LAQ_SHARED(name) extern __shared__ uint4 name[]

// sm_75 has half of the instruction for F16 and none for BF16, earlier ones have neither. What is not there does nothing:
// kernels that need it are never launched.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 750
#    define LAQ_SM_75 1
#else
#    define LAQ_SM_75 0
#endif
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#    define LAQ_SM_80 1
#else
#    define LAQ_SM_80 0
#endif

LAQ_DEVICE void laq_sync_block() {
    __syncthreads();
}

LAQ_DEVICE void laq_sync_warp() {
    __syncwarp();
}

LAQ_DEVICE float laq_shfl_xor(float x, int mask) {
    return __shfl_xor_sync(0xffffffffu, x, mask, 32);
}

// whether the condition holds in any lane of the warp
LAQ_DEVICE bool laq_any(bool x) {
    return __any_sync(0xffffffffu, x) != 0;
}

// through the read-only path: nothing that a kernel reads this way is written by it
template <typename T> LAQ_DEVICE T laq_ldg(const T * ptr) {
    return __ldg(ptr);
}

// bring a line into the L2 cache
LAQ_DEVICE void laq_prefetch(const void * ptr) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(ptr));
}

LAQ_DEVICE float laq_exp2(float x) {
    float res;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(res) : "f"(x));
    return res;
}

LAQ_DEVICE float laq_log2(float x) {
    return __log2f(x);
}

LAQ_DEVICE float laq_div(float x, float y) {
    return __fdividef(x, y);
}

LAQ_DEVICE uint32_t laq_byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
    return __byte_perm(x, y, selector);
}

// two numbers of 16 bits in a register, the first one below

LAQ_DEVICE uint32_t laq_pack_f16(float x, float y) {
    const __half2 res = __floats2half2_rn(x, y);
    return reinterpret_cast<const uint32_t &>(res);
}

LAQ_DEVICE float2 laq_unpack_f16(uint32_t x) {
    return __half22float2(reinterpret_cast<const __half2 &>(x));
}

LAQ_DEVICE uint32_t laq_pack_bf16(float x, float y) {
#if LAQ_SM_80
    const __nv_bfloat162 res = __floats2bfloat162_rn(x, y);
    return reinterpret_cast<const uint32_t &>(res);
#else
    (void) x, (void) y;
    return 0;
#endif
}

LAQ_DEVICE float2 laq_unpack_bf16(uint32_t x) {
    return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
}

LAQ_DEVICE uint32_t laq_add_f16(uint32_t x, uint32_t y) {
#if LAQ_SM_75
    const __half2 res = __hadd2(reinterpret_cast<const __half2 &>(x), reinterpret_cast<const __half2 &>(y));
    return reinterpret_cast<const uint32_t &>(res);
#else
    (void) x, (void) y;
    return 0;
#endif
}

LAQ_DEVICE uint32_t laq_fma_f16(uint32_t x, uint32_t y, uint32_t z) {
#if LAQ_SM_75
    const __half2 res = __hfma2(reinterpret_cast<const __half2 &>(x), reinterpret_cast<const __half2 &>(y),
                                reinterpret_cast<const __half2 &>(z));
    return reinterpret_cast<const uint32_t &>(res);
#else
    (void) x, (void) y, (void) z;
    return 0;
#endif
}

// c += a b on the tensor cores, sums in F32. With lane = 4 g + t and two numbers in each of a and b:
//   a0 a1: rows g, g + 8, columns 2t, 2t+1       b0: rows 2t, 2t+1, column g
//   a2 a3: the same, columns 2t+8, 2t+9 (k16)    b1: rows 2t+8, 2t+9, column g (k16)
//   c:     (g, 2t), (g, 2t+1), (g + 8, 2t), (g + 8, 2t+1)

LAQ_DEVICE void laq_mma_f16_k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
#if LAQ_SM_75
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b0));
#else
    (void) c, (void) a0, (void) a1, (void) b0;
#endif
}

#define LAQ_MMA_K16(type)                                                                                            \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, " \
        "{%0, %1, %2, %3};"                                                                                          \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                             \
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))

LAQ_DEVICE void laq_mma_f16_k16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                uint32_t b1) {
#if LAQ_SM_80
    LAQ_MMA_K16("f16");
#else
    (void) c, (void) a0, (void) a1, (void) a2, (void) a3, (void) b0, (void) b1;
#endif
}

LAQ_DEVICE void laq_mma_bf16_k16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                 uint32_t b1) {
#if LAQ_SM_80
    LAQ_MMA_K16("bf16");
#else
    (void) c, (void) a0, (void) a1, (void) a2, (void) a3, (void) b0, (void) b1;
#endif
}

#undef LAQ_MMA_K16
