// What queries get from archived and resident tokens together: values are fitted to that.

#include "laq-reselect.h"

#include <algorithm>

// V of what a head may choose from, as it was before any fit: [n_embd_head_v][n]
void laq_reselection::gather_values(const std::vector<laq_row> & of_head, uint32_t ikv, uint32_t h,
                                    const laq_archive_part & values, const laq_cell_rows & cells,
                                    std::vector<float> & dst) const {
    const ggml_type type     = laq.v(ikv)->type;
    const ggml_type archived = laq.recall->type[1];
    const int64_t   n        = laq_n_embd_of(laq, ikv, 1);
    const size_t    n_there  = ggml_row_size(archived, n);

    std::vector<uint32_t> from;
    for (const laq_row & row : of_head) {
        if (!comes_back(1, row)) {
            from.push_back(row.cell);
        }
    }
    std::vector<uint8_t> bytes(from.size() * cells.row_size());
    cells.get(h, from, bytes.data());
    dst.resize(of_head.size() * n);
    std::vector<float> row(n);
    const uint8_t *    next = bytes.data();
    for (size_t i = 0; i < of_head.size(); ++i) {
        if (comes_back(1, of_head[i])) {
            laq_convert(archived, values.row(h, of_head[i].pos, n_there), GGML_TYPE_F32, (uint8_t *) row.data(), n);
        } else {
            laq_convert(type, next, GGML_TYPE_F32, (uint8_t *) row.data(), n);
            next += cells.row_size();
        }
        for (int64_t c = 0; c < n; ++c) {
            dst[c * of_head.size() + i] = row[c];
        }
    }
}

// What the fitted queries get from all that the heads may choose from goes to the ring. false: a block was lost
bool laq_reselection::observe(uint32_t ikv, const laq_rows_of_layer & of_heads, const laq_archive_part & keys) {
    laq_archive_part values;
    if (!values.read(laq.recall->archive, ikv, 1, blocks)) {
        return false;
    }
    const laq_layer &       layer = laq.layers[ikv];
    const uint32_t          n_end = laq.cells().used_max_p1();
    const laq_cell_rows     k_cells(laq, ikv, false, 0, n_end, laq.recall->fetched);
    const laq_cell_rows     v_cells(laq, ikv, true, 0, n_end, laq.recall->fetched_values);
    const laq_layer_queries by(laq, ikv, fitted);
    const size_t            d       = layer.n_embd_head_v;
    const size_t            n_group = layer.n_head / layer.n_head_kv;

    std::vector<std::vector<float>> outs(fitted.size(), std::vector<float>(layer.n_ring_out()));
    std::vector<float>              of_values, of_queries(n_group * fitted.size() * d);
    for (uint32_t h = 0; h < of_heads.size(); ++h) {
        const std::vector<laq_row> & of_head = of_heads[h];
        if (!is_masked(of_head)) {
            set_mask(of_head);
        }
        laq_head_op  op    = op_of(of_head, ikv, h, by);
        const size_t n_row = ggml_row_size(op.type, op.n_embd_head);

        op.k    = laq.recall->scorer.keys(ikv, of_head.size() * n_row);
        op.fill = [&](int64_t i0, int64_t i1) {
            gather(of_head.data() + i0, of_head.data() + i1, ikv, h, keys, k_cells, (uint8_t *) op.k + i0 * n_row);
        };
        gather_values(of_head, ikv, h, values, v_cells, of_values);
        laq.recall->scorer.outputs(op, of_values.data(), d, of_queries.data());
        for (size_t j = 0; j < fitted.size(); ++j) {
            for (size_t g = 0; g < n_group; ++g) {
                std::copy_n(of_queries.data() + (g * fitted.size() + j) * d, d, outs[j].data() + (h * n_group + g) * d);
            }
        }
    }
    for (size_t j = 0; j < fitted.size(); ++j) {
        laq.set_output(ikv, fitted[j].slot, outs[j]);
    }
    return true;
}

// as far as the outputs go, nothing is chosen
laq_reselection::result laq_reselection::observe_all() {
    begin();
    fitted = obs;
    for (uint32_t ikv = 0; ikv < laq.layers.size(); ++ikv) {
        laq_archive_part  keys;
        laq_rows_of_layer of_heads;
        if (!begin_layer(ikv, keys, of_heads) || !observe(ikv, of_heads, keys)) {
            return result::LOST;
        }
    }
    return result::DONE;
}

void laq_cache::observe_archive(const laq_eviction & e, const std::vector<uint32_t> & order,
                                const std::vector<laq_observation> & obs) {
    laq_reselection s(*this, e, order, obs, true);
    while (s.observe_all() == laq_reselection::result::LOST) {
    }
}
