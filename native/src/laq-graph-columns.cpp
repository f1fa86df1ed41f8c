#include "laq-graph-columns.h"

#include <algorithm>
#include <cstring>

// cells of the tokens that every head of every layer holds below n_intact and the archive has not
static void find_held(laq_columns & c, const laq_seq & seq, int32_t seq_id, const std::vector<uint32_t> & order) {
    const laq_store & store = c.store;

    std::vector<int32_t> lost;
    for (int32_t p = 0; p < seq.n_intact; ++p) {
        if (!c.archive.has(p)) {
            lost.push_back(p);
        }
    }
    c.held.clear();
    c.held_cells.clear();
    if (lost.empty()) {
        return;
    }
    std::vector<int32_t> at(lost.size() * store.n_heads, -1);
    for (uint32_t head = 0; head < store.n_heads; ++head) {
        for (const uint32_t cell : order) {
            const int32_t p  = store.pos_at(seq, seq_id, head, cell);
            const auto    it = std::lower_bound(lost.begin(), lost.end(), p);
            if (it != lost.end() && *it == p) {
                at[(it - lost.begin()) * store.n_heads + head] = (int32_t) cell;
            }
        }
    }
    for (size_t i = 0; i < lost.size(); ++i) {
        const auto first = at.begin() + i * store.n_heads;
        const auto last  = first + store.n_heads;
        if (std::find(first, last, -1) == last) {
            c.held.push_back(lost[i]);
            c.held_cells.insert(c.held_cells.end(), first, last);
        }
    }
}

void laq_columns::set(const laq_seq & seq, int32_t seq_id, int64_t n) {
    const std::vector<uint32_t> order = store.resident(seq_id);

    lost     = false;
    n_intact = seq.n_intact;
    cell.assign(n, -1);
    for (const uint32_t c : order) {
        const int32_t p = store.cells(seq_id).pos_get(c);
        if (p >= n_intact && p < n) {
            cell[p] = (int32_t) c;
        }
    }
    find_held(*this, seq, seq_id, order);
}

bool laq_columns::has(int32_t p) const {
    return cell[p] >= 0 || (p < n_intact && (archive.has(p) || std::binary_search(held.begin(), held.end(), p)));
}

static uint8_t * row_of(const ggml_tensor * dst, int64_t column, uint32_t h) {
    return (uint8_t *) dst->data + column * dst->nb[2] + h * dst->nb[1];
}

// the archived columns of a block; false: it has none
static bool fill_archived(ggml_tensor * dst, const laq_columns_part & a, uint32_t block) {
    laq_columns & c     = a.columns;
    laq_archive & r     = c.archive;
    const int64_t first = (int64_t) block * laq_archive::N_BLOCK;
    if (first >= c.n_intact || !r.has_block(block)) {
        return false;
    }
    std::vector<uint8_t>         read;
    std::unique_lock<std::mutex> lock(c.file, std::defer_lock);
    if (!r.in_memory(block)) {
        lock.lock();
    }
    const uint8_t * src = r.has_block(block) ? r.part(block, a.ikv, a.part, read) : nullptr;
    if (!src) {
        c.lost = true;
        return false;
    }
    const ggml_type type  = (ggml_type) r.type(a.part);
    const size_t    n_row = ggml_row_size(type, dst->ne[0]);
    const int64_t   end   = std::min<int64_t>(first + laq_archive::N_BLOCK, dst->ne[2]);
    for (int64_t h = 0; h < dst->ne[1]; ++h) {
        for (int64_t p = first; p < end; ++p) {
            laq_convert(type, laq_archive::row_of(src, h, p, n_row), dst->type, row_of(dst, p, h), dst->ne[0]);
        }
    }
    return true;
}

static void fill_column(ggml_tensor * dst, const laq_columns_part & a, const laq_lanes & lanes, int64_t p,
                        bool archived) {
    const laq_columns & c    = a.columns;
    const auto          held = std::lower_bound(c.held.begin(), c.held.end(), (int32_t) p);
    const bool          here = held != c.held.end() && *held == p;
    if (c.cell[p] < 0 && !here) {
        if (!archived) {
            memset(row_of(dst, p, 0), 0, dst->nb[2]);  // it is not seen, but must be finite
        }
        return;
    }
    const int32_t * of_heads =
        here ? c.held_cells.data() + (held - c.held.begin()) * c.store.n_heads + c.store.layers[a.ikv].first_head
             : nullptr;
    for (int64_t h = 0; h < dst->ne[1]; ++h) {
        uint8_t *       to  = row_of(dst, p, h);
        const uint8_t * row = lanes.row((const uint8_t *) dst->src[0]->data, h, here ? of_heads[h] : c.cell[p], to);
        if (row != to) {
            memcpy(to, row, dst->nb[1]);
        }
    }
}

// a block of columns for each thread of the CPU's backend, and on
static void fill(ggml_tensor * dst, int ith, int nth, void * data) {
    const laq_columns_part & a     = *(const laq_columns_part *) data;
    const laq_lanes          lanes = a.columns.store.lanes(a.ikv, a.part);
    const int64_t            n     = dst->ne[2];

    for (int64_t b = ith; b * laq_archive::N_BLOCK < n; b += nth) {
        const bool archived = fill_archived(dst, a, b);
        for (int64_t p = b * laq_archive::N_BLOCK; p < std::min<int64_t>(n, (b + 1) * laq_archive::N_BLOCK); ++p) {
            fill_column(dst, a, lanes, p, archived);
        }
    }
}

ggml_tensor * laq_graph_columns(ggml_context * ctx, ggml_tensor * cells, const laq_columns_part & a, int64_t n) {
    const laq_layer & layer  = a.columns.store.layers[a.ikv];
    ggml_tensor *     args[] = { cells };
    return ggml_custom_4d(ctx, cells->type, layer.n_embd_head(a.part), layer.n_head_kv, n, 1, args, 1, fill,
                          GGML_N_TASKS_MAX, const_cast<laq_columns_part *>(&a));
}
