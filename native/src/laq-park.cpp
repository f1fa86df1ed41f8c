// Sequences that wait outside of the cells. Rows in cells are few and are copied; the archive is moved.

#include "laq-park.h"

#include "laq-api.h"
#include "laq-recall.h"

#include <algorithm>
#include <cstring>

laq_parked & laq_cache::park(int32_t seq_id) {
    laq_check(n_tokens(seq_id) > 0, "the sequence holds no tokens: there is nothing to park");
    const laq_seq & seq = seqs[seq_id];

    auto p        = std::make_unique<laq_parked>();
    p->n_tokens   = n_tokens(seq_id);
    p->n_resident = n_resident(seq_id);
    p->pending    = seq.pending.has_value();
    p->pinned     = seq.pinned;
    p->remembers  = seq.remembers;
    p->state      = laq_state_of_cells(*this, seq_id);
    parked.reserve(parked.size() + 1);
    if (recall) {
        p->pos     = recall->pos;
        p->token   = recall->token;
        p->archive = recall->archive.detach();
    }
    // nothing fails from here on
    parked.push_back(std::move(p));
    kv->seq_rm(seq_id, -1, -1);
    return *parked.back();
}

void laq_cache::resume(int32_t seq_id, laq_parked & p) {
    laq_check(n_tokens(seq_id) == 0, "the sequence holds tokens: park or remove them first");
    if (n_used() == 0) {
        kv->v_heads[0] = 0;  // cells lie in the order they had, so that sums over them are the same
    }
    const uint64_t n_lost = recall ? recall->archive.n_lost : 0;
    ctx->synchronize();
    const size_t n = ctx->state_seq_set_data(seq_id, p.state.data(), p.state.size(), 0);
    if (recall) {
        recall->archive.n_lost = n_lost;  // a state without its archive counts as lost what comes now
    }
    if (n != p.state.size()) {
        kv->seq_rm(seq_id, -1, -1);
        throw laq_error(LAQ_STATUS_NO_MEMORY, "no cells for the " + std::to_string(p.n_resident) +
                                                  " that were parked: " + std::to_string(n_used()) + " of " +
                                                  std::to_string(n_cells()) + " are in use by other sequences");
    }
    seqs[seq_id].pinned = std::move(p.pinned);
    seqs[seq_id].remembers &= p.remembers;
    if (recall) {
        recall->archive.attach(*p.archive);
        recall->pos.swap(p.pos);
        recall->token.swap(p.token);
    }
}

//
// laq.h
//

static size_t index_of(const laq_cache * laq, const laq_parked * parked) {
    laq_check(laq && parked, "laq and parked must not be NULL");
    const auto it =
        std::find_if(laq->parked.begin(), laq->parked.end(), [&](const auto & p) { return p.get() == parked; });
    laq_check(it != laq->parked.end(), "this sequence is not parked here: it was resumed or forgotten");
    return it - laq->parked.begin();
}

laq_status laq_park(laq_cache * laq, int32_t seq_id, laq_parked ** out) {
    return laq_guarded([&] {
        laq_check_seq(laq, seq_id);
        laq_check(out, "out must not be NULL");
        *out = &laq->park(seq_id);
    });
}

laq_status laq_resume(laq_cache * laq, int32_t seq_id, laq_parked * parked) {
    return laq_guarded([&] {
        const size_t i = index_of(laq, parked);
        laq_check_seq(laq, seq_id);
        laq->resume(seq_id, *parked);
        laq->parked.erase(laq->parked.begin() + i);
    });
}

laq_status laq_forget(laq_cache * laq, laq_parked * parked) {
    return laq_guarded([&] { laq->parked.erase(laq->parked.begin() + index_of(laq, parked)); });
}

laq_status laq_get_parked(const laq_cache * laq, const laq_parked * parked, laq_parked_info * info) {
    return laq_guarded([&] {
        const laq_parked & p = *laq->parked[index_of(laq, parked)];
        laq_check(info && info->size >= sizeof(uint32_t), "info is NULL or info->size is not set");

        laq_parked_info res = {};
        res.size            = info->size;
        res.n_tokens        = p.n_tokens;
        res.n_resident      = p.n_resident;
        res.pending         = p.pending;
        res.bytes           = p.state.size() + (p.archive ? p.archive->bytes_in_memory() : 0);
        res.file_bytes      = p.archive ? p.archive->bytes_in_file() : 0;
        memcpy(info, &res, std::min<size_t>(info->size, sizeof(res)));
    });
}
