#pragma once

// The primitives of laq-score-device.cuh on the emulator.

#define LAQ_SCORE_EMULATED

#include "simt.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __launch_bounds__(...)
#define LAQ_DEVICE       static inline
#define LAQ_INLINE       inline
#define LAQ_HOST_DEVICE  inline
#define LAQ_SHARED(name) uint4 * name = (uint4 *) simt::group_memory()
#define LAQ_SM_80        emulated_sm_80

#define threadIdx (simt::self().thread)
#define blockIdx  (simt::self().group)
#define gridDim   (simt::self().n_groups)

extern bool emulated_sm_80;

struct alignas(8) uint2 {
    uint32_t x, y;
};

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

struct alignas(8) float2 {
    float x, y;
};

struct alignas(16) float4 {
    float x, y, z, w;
};

//
// memory: an address that the type's alignment forbids is an error on the device
//

void check_read(const void * ptr, size_t size);

template <typename T> T laq_ldg(const T * ptr) {
    if ((uintptr_t) ptr % alignof(T) != 0) {
        simt::fail("misaligned load");
    }
    check_read(ptr, sizeof(T));
    return *ptr;
}

LAQ_DEVICE void laq_prefetch(const void *) {}

//
// threads
//

LAQ_DEVICE void laq_sync_block(SIMT_CALLER) {
    simt::group_wait(SIMT_SITE("block barrier"));
}

LAQ_DEVICE void laq_sync_warp(SIMT_CALLER) {
    simt::simd_barrier(simt::ALL_LANES, file, line);
}

LAQ_DEVICE float laq_shfl_xor(float x, int mask, SIMT_CALLER) {
    return simt::shuffle_xor(x, mask, simt::ALL_LANES, simt::WIDTH, file, line);
}

LAQ_DEVICE bool laq_any(bool x, SIMT_CALLER) {
    return simt::any(x, simt::ALL_LANES, file, line);
}

//
// numbers
//

LAQ_DEVICE float flushed(float x) {
    return fabsf(x) < 1.17549435e-38f ? copysignf(0.0f, x) : x;
}

LAQ_DEVICE float laq_exp2(float x) {
    return flushed(exp2f(flushed(x)));
}

LAQ_DEVICE float laq_log2(float x) {
    return log2f(x);
}

// 0 for divisors beyond 2^126
LAQ_DEVICE float laq_div(float x, float y) {
    return fabsf(y) > 8.507059e37f && std::isfinite(y) ? 0.0f : x / y;
}

LAQ_DEVICE uint32_t laq_byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
    const uint64_t both = (uint64_t) y << 32 | x;

    uint32_t res = 0;
    for (int i = 0; i < 4; ++i) {
        res |= (uint32_t) (both >> (8 * (selector >> 4 * i & 7)) & 0xff) << 8 * i;
    }
    return res;
}

LAQ_DEVICE uint32_t f32_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
}

LAQ_DEVICE float bits_f32(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

LAQ_DEVICE float compute_f16_f32(uint32_t h) {
    const uint32_t sign     = (h & 0x8000) << 16;
    const int      exponent = h >> 10 & 31;
    const uint32_t fraction = h & 0x3ff;
    if (exponent == 31) {
        return bits_f32(sign | 0x7f800000u | fraction << 13);
    }
    const float x = exponent ? ldexpf((float) (fraction | 0x400), exponent - 25) : ldexpf((float) fraction, -24);
    return sign ? -x : x;
}

struct f16_table {
    float values[1 << 16];

    f16_table() {
        for (uint32_t h = 0; h < 1 << 16; ++h) {
            values[h] = compute_f16_f32(h);
        }
    }
};

LAQ_DEVICE float f16_f32(uint32_t h) {
    static const f16_table table;
    return table.values[h];
}

// to the nearest, ties to even
LAQ_DEVICE uint32_t f64_f16(double x) {
    const uint32_t sign = std::signbit(x) ? 0x8000 : 0;
    x                   = fabs(x);
    if (std::isnan(x)) {
        return sign | 0x7fff;
    }
    if (x >= 65520.0) {
        return sign | 0x7c00;
    }
    const int      exponent = x < 0x1p-14 ? -14 : std::ilogb(x);
    const uint32_t steps    = (uint32_t) nearbyint(ldexp(x, 10 - exponent));
    // a carry into the exponent is what it should be
    return sign | (steps + ((uint32_t) (exponent + 14) << 10));
}

LAQ_DEVICE uint32_t f32_bf16(float x) {
    const uint32_t bits = f32_bits(x);
    return std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

LAQ_DEVICE uint32_t laq_pack_f16(float x, float y) {
    return f64_f16(x) | f64_f16(y) << 16;
}

LAQ_DEVICE float2 laq_unpack_f16(uint32_t x) {
    return { f16_f32(x & 0xffff), f16_f32(x >> 16) };
}

LAQ_DEVICE uint32_t laq_pack_bf16(float x, float y) {
    return f32_bf16(x) | f32_bf16(y) << 16;
}

LAQ_DEVICE float2 laq_unpack_bf16(uint32_t x) {
    return { bits_f32(x << 16), bits_f32(x & 0xffff0000u) };
}

LAQ_DEVICE uint32_t laq_fma_f16(uint32_t x, uint32_t y, uint32_t z) {
    const float2 a = laq_unpack_f16(x);
    const float2 b = laq_unpack_f16(y);
    const float2 c = laq_unpack_f16(z);
    // exact in F64, so that it is rounded once
    return f64_f16((double) a.x * b.x + c.x) | f64_f16((double) a.y * b.y + c.y) << 16;
}

LAQ_DEVICE uint32_t laq_add_f16(uint32_t x, uint32_t y) {
    return laq_fma_f16(x, 0x3c003c00u, y);
}

//
// tensor cores, as the PTX manual describes the fragments: lane = 4 g + t
//

struct mma_fragments {
    uint32_t a[4];
    uint32_t b[2];
};

template <int K, typename F> void mma(float (&c)[4], const mma_fragments & own, F unpack, const simt::site & where) {
    const simt::lanes<mma_fragments> all = simt::exchange(own, simt::ALL_LANES, where);

    const unsigned g = simt::self().lane / 4;
    const unsigned t = simt::self().lane % 4;
    float          sums[4];
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned row    = g + i / 2 * 8;
        const unsigned column = 2 * t + i % 2;
        double         sum    = c[i];
        for (unsigned k = 0; k < K; ++k) {
            const unsigned      quad = k % 8 / 2;  // lane of the quad that holds element k
            const mma_fragments x    = all[row % 8 * 4 + quad];
            const mma_fragments y    = all[column * 4 + quad];
            const float2        a    = unpack(x.a[row / 8 + k / 8 * 2]);
            const float2        b    = unpack(y.b[k / 8]);
            sum += k % 2 ? (double) a.y * b.y : (double) a.x * b.x;
        }
        sums[i] = (float) sum;
    }
    std::copy(sums, sums + 4, c);
}

LAQ_DEVICE void laq_mma_f16_k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0, SIMT_CALLER) {
    mma<8>(c, { { a0, a1, 0, 0 }, { b0, 0 } }, laq_unpack_f16, SIMT_SITE("mma m16n8k8"));
}

LAQ_DEVICE void laq_mma_f16_k16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                uint32_t b1, SIMT_CALLER) {
    mma<16>(c, { { a0, a1, a2, a3 }, { b0, b1 } }, laq_unpack_f16, SIMT_SITE("mma m16n8k16"));
}

LAQ_DEVICE void laq_mma_bf16_k16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                 uint32_t b1, SIMT_CALLER) {
    mma<16>(c, { { a0, a1, a2, a3 }, { b0, b1 } }, laq_unpack_bf16, SIMT_SITE("mma m16n8k16 bf16"));
}
