#include "laq-rows.h"

#include "laq-error.h"

#include <algorithm>
#include <cstring>

ggml_backend_dev_t laq_device_of(ggml_backend_buffer_t buffer) {
    const ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(buffer);
    if (ggml_backend_dev_t dev = ggml_backend_buft_get_device(buft)) {
        return dev;
    }
    return ggml_backend_buft_is_host(buft) ? ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU) : nullptr;
}

void laq_convert(ggml_type from, const uint8_t * src, ggml_type to, uint8_t * dst, int64_t n) {
    constexpr int64_t N_STEP = 256;  // whole blocks of every type

    if (from == to) {
        memcpy(dst, src, ggml_row_size(from, n));
        return;
    }
    float values[N_STEP];
    for (int64_t i = 0; i < n; i += N_STEP) {
        const int64_t   n_now = std::min(N_STEP, n - i);
        const uint8_t * s     = src + ggml_row_size(from, i);
        uint8_t *       d     = dst + ggml_row_size(to, i);
        if (from == GGML_TYPE_F32) {
            memcpy(values, s, n_now * sizeof(float));
        } else {
            ggml_get_type_traits(from)->to_float(s, values, n_now);
        }
        if (to == GGML_TYPE_F32) {
            memcpy(d, values, n_now * sizeof(float));
        } else {
            ggml_get_type_traits(to)->from_float_ref(values, d, n_now);
        }
    }
}

uint8_t * laq_host_buffer::get(ggml_backend_dev_t dev, size_t size) {
    ggml_backend_buffer_type_t wanted = dev ? ggml_backend_dev_host_buffer_type(dev) : nullptr;

    wanted = wanted ? wanted : ggml_backend_cpu_buffer_type();
    if (!buf || type != wanted || ggml_backend_buffer_get_size(buf.get()) < size) {
        laq_fault();
        buf.reset();
        buf.reset(ggml_backend_buft_alloc_buffer(wanted, size));
        type = wanted;
    }
    if (!buf) {
        throw laq_error(LAQ_STATUS_NO_MEMORY, "no host memory for rows of the cache");
    }
    return (uint8_t *) ggml_backend_buffer_get_base(buf.get());
}

laq_lanes::laq_lanes(const ggml_tensor * t, uint32_t n_head_kv, uint32_t n_embd_head, bool trans) :
    n_head_kv(n_head_kv), n_per_head(trans ? n_embd_head : 1) {
    item = trans ? ggml_type_size(t->type) : ggml_row_size(t->type, n_embd_head);
    lane = trans ? t->ne[1] * item : item;
    cell = trans ? item : t->nb[1];
}

laq_cell_rows::laq_cell_rows(ggml_tensor * t, const laq_lanes & lanes, uint32_t first, uint32_t last,
                             laq_host_buffer & fetched) : t(t), lanes(lanes), n_row(lanes.item * lanes.n_per_head) {
    if (ggml_backend_buffer_is_host(t->buffer)) {
        data = (uint8_t *) t->data;
        return;
    }
    const bool whole = lanes.n_per_head > 1;
    offset           = whole ? 0 : first * t->nb[1];
    n_transferred    = whole ? ggml_nbytes(t) : (last - first) * t->nb[1];
    data             = fetched.get(laq_device_of(t->buffer), ggml_nbytes(t)) - offset;
    ggml_backend_tensor_get(t, data + offset, offset, n_transferred);
}

void laq_cell_rows::set(uint32_t head, const std::vector<uint32_t> & cells, const uint8_t * src) {
    for (uint32_t i = 0; i < lanes.n_per_head; ++i) {
        uint8_t * dst = data + (head * lanes.n_per_head + i) * lanes.lane;
        for (size_t c = 0; c < cells.size(); ++c) {
            memcpy(dst + cells[c] * lanes.cell, src + c * n_row + i * lanes.item, lanes.item);
        }
    }
}

const uint8_t * laq_lanes::row(const uint8_t * data, uint32_t head, uint32_t c, uint8_t * turned) const {
    const uint8_t * src = data + head * n_per_head * lane + c * cell;
    if (n_per_head == 1) {
        return src;
    }
    for (uint32_t i = 0; i < n_per_head; ++i) {
        memcpy(turned + i * item, src + i * lane, item);
    }
    return turned;
}

const uint8_t * laq_cell_rows::row(uint32_t head, uint32_t c, uint8_t * turned) const {
    return lanes.row(data, head, c, turned);
}

void laq_cell_rows::write() const {
    if (n_transferred > 0) {
        ggml_backend_tensor_set(t, data + offset, offset, n_transferred);
    }
}
