#pragma once

// Rows of K and V in host memory: of cells, whatever the layout of their tensor, and from one type to another.

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <cstdint>
#include <vector>

// the device of a buffer; the CPU's buffer type names none
ggml_backend_dev_t laq_device_of(ggml_backend_buffer_t buffer);

// n values of one type as values of another
void laq_convert(ggml_type from, const uint8_t * src, ggml_type to, uint8_t * dst, int64_t n);

// Host memory that is kept from one use to the next, for one user at a time.
class laq_host_buffer {
  public:
    // at least size bytes, which the device copies to and from without a detour if it has such memory; dev may be null.
    // Throws laq_error.
    uint8_t * get(ggml_backend_dev_t dev, size_t size);

  private:
    ggml_backend_buffer_type_t type = nullptr;
    ggml_backend_buffer_ptr    buf;
};

// A tensor of the cache as lanes: what one KV head, or one channel where V is transposed, holds of each cell.
struct laq_lanes {
    uint32_t n_head_kv;
    uint32_t n_per_head;  // lanes of one KV head
    size_t   lane;        // bytes from one lane to the next
    size_t   cell;        // bytes from one cell to the next
    size_t   item;        // bytes of a lane in a cell

    // trans: a row of the tensor is a channel of all cells
    laq_lanes(const ggml_tensor * t, uint32_t n_head_kv, uint32_t n_embd_head, bool trans);

    // the address of a row of the tensor's data; where V is transposed, of a copy in `turned`
    const uint8_t * row(const uint8_t * data, uint32_t head, uint32_t cell, uint8_t * turned) const;
};

// K or V of one layer and stream by cells: rows [n_embd_head] of one KV head.
class laq_cell_rows {
  public:
    // Cells outside [first, last) are not looked at. Of a tensor that the host does not see, no more is fetched, into
    // memory of `fetched`.
    laq_cell_rows(ggml_tensor * t, const laq_lanes & lanes, uint32_t first, uint32_t last, laq_host_buffer & fetched);

    size_t row_size() const { return n_row; }

    // rows of cells, one after the other
    void set(uint32_t head, const std::vector<uint32_t> & cells, const uint8_t * src);

    // the address of a row; where V is transposed, of a copy in `turned` [row_size()]
    const uint8_t * row(uint32_t head, uint32_t cell, uint8_t * turned) const;
    void            write() const;  // what was set goes to the device

    uint64_t n_transferred = 0;  // bytes fetched, 0 = the host sees the tensor

  private:
    ggml_tensor * t;
    laq_lanes     lanes;
    uint8_t *     data;        // of cell 0, whether it was fetched or not
    size_t        offset = 0;  // of what was fetched in the tensor
    size_t        n_row;
};
