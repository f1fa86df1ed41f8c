#pragma once

#include "laq.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <cstdint>
#include <string>
#include <vector>

struct laq_cache;

// Cells that move: src [n_layer][n_head_kv][dst.size()], in order of position; dst ascending.
struct laq_moves {
    std::vector<uint32_t>                           dst;
    std::vector<std::vector<std::vector<uint32_t>>> src;
};

// Whether a graph moves K and V of every layer where they are, and why. The host moves them otherwise, and where it sees
// them anyway. env: LAQ_COMPACT = graph | host, for tests
struct laq_mover_choice {
    bool        by_graph;
    std::string reason;
};

laq_mover_choice laq_choose_mover(const laq_cache & laq);

// let the scheduler plan for the largest graph
void laq_graph_reserve_moves(laq_cache & laq);

// Host memory that is kept from one use to the next, for one user at a time.
class laq_host_buffer {
  public:
    // at least size bytes, which the device copies to and from without a detour if it has such memory; dev may be null
    uint8_t * get(ggml_backend_dev_t dev, size_t size);

  private:
    ggml_backend_buffer_type_t type = nullptr;
    ggml_backend_buffer_ptr    buf;
};

// K or V of one KV layer by cells: read and written as rows [n_embd_head] of one KV head, also where V is transposed.
class laq_cell_rows {
  public:
    // Cells outside [first, last) are not looked at: of a tensor that the host does not see, no more is fetched, to where
    // it is this one's alone.
    laq_cell_rows(const laq_cache & laq, uint32_t ikv, bool is_v, uint32_t first, uint32_t last,
                  laq_host_buffer & fetched);

    size_t row_size() const { return n_row; }

    // rows of cells, one after the other
    void get(uint32_t head, const std::vector<uint32_t> & cells, uint8_t * dst) const;
    void set(uint32_t head, const std::vector<uint32_t> & cells, const uint8_t * src);

    // the address of a row; where V is transposed, of a copy in `turned` [row_size()]
    const uint8_t * row(uint32_t head, uint32_t cell, uint8_t * turned) const;

    void write() const;  // what was set goes to the device

    uint64_t n_transferred;  // bytes that were fetched to be seen by the host, 0 = it sees them anyway

  private:
    ggml_tensor * t;
    uint8_t *     data;    // of cell 0, whether it was fetched or not
    size_t        offset;  // of what was fetched in the tensor
    uint32_t      n_lanes;
    size_t        n_row, lane, cell, item;
};

// Move the cells of all layers, byte for byte. By a graph indices alone travel. Throws laq_error.
void laq_move(laq_cache & laq, const laq_moves & moves);
