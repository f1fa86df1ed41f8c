// What queries get from archived and resident tokens together: values are fitted to that.

#include "laq-reselect.h"

#include <algorithm>

laq_layer_outputs::laq_layer_outputs(const laq_reselection & s, uint32_t ikv, const laq_archive_part & values) :
    s(s), ikv(ikv), values(s, ikv, 1, values, s.laq.recall->fetched_values),
    outs(s.fitted.size(), std::vector<float>(s.laq.layers[ikv].n_ring_out())) {}

void laq_layer_outputs::ask(laq_head_op & op) {
    op.type_v        = values.type();
    op.n_embd_head_v = s.laq.layers[ikv].n_embd_head_v;
    of_head.resize(op.n_kv * values.row_size());
    of_op.resize(op.n_group * op.n_q * op.n_embd_head_v);
    op.v       = of_head.data();
    op.outputs = of_op.data();
}

void laq_layer_outputs::gather(const std::vector<laq_row> & rows, uint32_t h, int64_t i0, int64_t i1) {
    values.gather(rows.data() + i0, rows.data() + i1, h, of_head.data() + i0 * values.row_size());
}

void laq_layer_outputs::take(const laq_head_op & op, uint32_t h) {
    const size_t d     = op.n_embd_head_v;
    const size_t first = op.n_q - outs.size();
    for (size_t j = 0; j < outs.size(); ++j) {
        for (int64_t g = 0; g < op.n_group; ++g) {
            std::copy_n(of_op.data() + (g * op.n_q + first + j) * d, d, outs[j].data() + (h * op.n_group + g) * d);
        }
    }
}

void laq_layer_outputs::keep() const {
    for (size_t j = 0; j < outs.size(); ++j) {
        s.laq.set_output(ikv, s.fitted[j].slot, outs[j]);
    }
}

// as far as the outputs go, nothing is chosen
laq_reselection::result laq_reselection::observe_all() {
    begin();
    fitted = obs;
    weighs = true;
    for (uint32_t ikv = 0; ikv < laq.layers.size(); ++ikv) {
        laq_archived_layer archive;
        laq_rows_of_layer  of_heads;
        if (!begin_layer(ikv, archive, of_heads)) {
            return result::LOST;
        }
        score(ikv, of_heads, archive);
    }
    return result::DONE;
}

void laq_cache::observe_archive(const laq_eviction & e, const std::vector<uint32_t> & order,
                                const std::vector<laq_observation> & obs) {
    laq_reselection s(*this, e, order, obs, true);
    while (s.observe_all() == laq_reselection::result::LOST) {
    }
}
