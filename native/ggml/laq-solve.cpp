#include "laq-solve.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

static void scale(double * dst, int64_t n, double factor) {
    for (int64_t i = 0; i < n; ++i) {
        dst[i] *= factor;
    }
}

// dst -= the sum of n_rows rows of n numbers, each times its factor. stride, stride_f: from one row or factor to the
// next. Four rows go together, so that dst is loaded and stored a fourth as often.
static void subtract(double * dst, const double * rows, int64_t stride, const double * factors, int64_t stride_f,
                     int64_t n_rows, int64_t n) {
    int64_t k = 0;
    for (; k + 4 <= n_rows; k += 4) {
        const double * a = rows + k * stride;
        const double * b = a + stride;
        const double * c = b + stride;
        const double * d = c + stride;
        const double * f = factors + k * stride_f;

        const double fa = f[0], fb = f[stride_f], fc = f[2 * stride_f], fd = f[3 * stride_f];
        for (int64_t i = 0; i < n; ++i) {
            dst[i] -= (fa * a[i] + fb * b[i]) + (fc * c[i] + fd * d[i]);
        }
    }
    for (; k < n_rows; ++k) {
        for (int64_t i = 0; i < n; ++i) {
            dst[i] -= factors[k * stride_f] * rows[k * stride + i];
        }
    }
}

// z [n_rhs][m] = (g + ridge I)^-1 r, with g [m][m] and r [m][n_rhs]; 0 where there is no solution. All sums go along
// rows, since those along columns would wait for one another.
static void solve(const float * g, const float * r, double ridge, int64_t m, int64_t n_rhs, float * z) {
    std::vector<double> u(g, g + m * m);  // the upper triangle becomes Cholesky's: g + ridge I = u^T u
    std::vector<double> x(r, r + m * n_rhs);
    for (int64_t i = 0; i < m; ++i) {
        double * row = u.data() + i * m;
        double * x_i = x.data() + i * n_rhs;
        subtract(row + i, u.data() + i, m, u.data() + i, m, i, m - i);
        subtract(x_i, x.data(), n_rhs, u.data() + i, m, i, n_rhs);
        row[i] += ridge;
        if (!(row[i] > 0.0)) {
            std::fill(z, z + m * n_rhs, 0.0f);
            return;
        }
        scale(row + i, m - i, 1.0 / std::sqrt(row[i]));
        scale(x_i, n_rhs, 1.0 / row[i]);
    }
    for (int64_t i = m - 1; i >= 0; --i) {
        const double * row = u.data() + i * m;
        double *       x_i = x.data() + i * n_rhs;
        subtract(x_i, x_i + n_rhs, n_rhs, row + i + 1, 1, m - 1 - i, n_rhs);
        scale(x_i, n_rhs, 1.0 / row[i]);
    }
    for (int64_t i = 0; i < m; ++i) {
        for (int64_t c = 0; c < n_rhs; ++c) {
            z[c * m + i] = (float) x[i * n_rhs + c];
        }
    }
}

// a custom op: dst F32 [m, d_v, n_head_kv] from src[0] = X X^T [m, m, n_head_kv] and src[1] = R [d_v, m, n_head_kv]
static void solve_heads(ggml_tensor * dst, int ith, int nth, void * ridge) {
    const ggml_tensor * g = dst->src[0];
    const ggml_tensor * r = dst->src[1];
    for (int64_t h = ith; h < dst->ne[2]; h += nth) {
        const auto at = [h](const ggml_tensor * t) { return (float *) ((char *) t->data + h * t->nb[2]); };
        solve(at(g), at(r), *(const float *) ridge, dst->ne[0], dst->ne[1], at(dst));
    }
}

ggml_tensor * laq_solve(ggml_context * ctx, ggml_tensor * g, ggml_tensor * r, const float * ridge) {
    ggml_tensor * args[] = { g, r };
    return ggml_custom_4d(ctx, GGML_TYPE_F32, g->ne[0], r->ne[0], g->ne[2], 1, args, 2, solve_heads, GGML_N_TASKS_MAX,
                          const_cast<float *>(ridge));
}
