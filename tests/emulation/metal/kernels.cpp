// laq-score.metal as C++

#include "kernels.h"
#include "metal_stdlib"

#define __METAL_VERSION__ 310
#define kernel
#define device
#define constant const
#define threadgroup
#define thread
// inside, so that C's math functions are hidden
namespace metal {
#include "laq-score.metal"
}
#undef kernel
#undef device
#undef constant
#undef threadgroup
#undef thread

using namespace metal;

static const ggml_metal_kargs_laq_score & kargs(const launch & l) {
    return *(const ggml_metal_kargs_laq_score *) l.args;
}

template <typename T> static T * buffer(const launch & l, int i) {
    return (T *) l.buffers[i];
}

static uint3 group() {
    const simt::vec3 & g = simt::self().group;
    return { g.x, g.y, g.z };
}

template <decltype(kernel_laq_score<laq_load_f32, false>) * score> static void launch_score(const launch & l) {
    const simt::position & p = simt::self();
    score(kargs(l), buffer<float>(l, 1), buffer<char>(l, 2), buffer<float>(l, 3), buffer<float2>(l, 4),
          buffer<float>(l, 5), buffer<float>(l, 6), (float *) simt::group_memory(), group(), p.index, p.lane, p.simd);
}

static void launch_queries(const launch & l) {
    kernel_laq_score_queries(kargs(l), buffer<char>(l, 1), buffer<float>(l, 2), group(), simt::self().lane);
}

static void launch_merge(const launch & l) {
    kernel_laq_score_merge(kargs(l), buffer<float2>(l, 1), buffer<float>(l, 2), buffer<float>(l, 3), group(),
                           simt::self().lane);
}

struct named_kernel {
    const char * name;
    launcher     run;
};

#define KERNEL(name, ...) { name, launch_score<__VA_ARGS__> },
static const named_kernel KERNELS[] = {
    { "kernel_laq_score_queries", launch_queries },
    { "kernel_laq_score_merge", launch_merge },
#include "kernels.inc"  // KERNEL(host name, instantiation), from laq-score.metal
};

launcher find_kernel(const char * name) {
    for (const named_kernel & k : KERNELS) {
        if (strcmp(k.name, name) == 0) {
            return k.run;
        }
    }
    return nullptr;
}
