// Parked sequences wait outside of the cells. Rows in cells are few and are copied. The archive is moved.

#include "laq-api.h"
#include "laq-state.h"

#include <algorithm>
#include <cstring>

static laq_parked & park(laq_context & laq, int32_t seq_id) {
    laq_check(laq.n_tokens(seq_id) > 0, "the sequence holds no tokens: there is nothing to park");

    auto p        = std::make_unique<laq_parked>();
    p->n_tokens   = laq.n_tokens(seq_id);
    p->n_resident = laq.n_resident(seq_id);
    p->seq        = laq.seqs[seq_id];
    p->state      = laq_state_of_cells(laq, seq_id);
    laq.parked.reserve(laq.parked.size() + 1);
    if (laq.archive_of(seq_id)) {
        p->archive = laq.archive_of(seq_id)->another();
        p->archive->take(*laq.archive_of(seq_id));
    }
    // nothing fails from here on
    laq.parked.push_back(std::move(p));
    laq.store.kv.seq_rm(seq_id, -1, -1);
    return *laq.parked.back();
}

static void resume(laq_context & laq, int32_t seq_id, laq_parked & p) {
    laq_check(laq.n_tokens(seq_id) == 0, "the sequence holds tokens: park or remove them first");
    laq_set_state_of_cells(laq, seq_id, p.state);
    // nothing fails from here on
    laq_seq &      seq   = laq.seqs[seq_id];
    const uint32_t first = seq.ring.first;
    seq                  = std::move(p.seq);
    seq.ring.first       = first;
    if (laq.archive_of(seq_id)) {
        laq.archive_of(seq_id)->take(*p.archive);
    }
}

static size_t index_of(const laq_context * laq, const laq_parked * parked) {
    laq_check(laq && parked, "laq and parked must not be NULL");
    const auto it =
        std::find_if(laq->parked.begin(), laq->parked.end(), [&](const auto & p) { return p.get() == parked; });
    laq_check(it != laq->parked.end(), "this sequence is not parked here: it was resumed or forgotten");
    return it - laq->parked.begin();
}

laq_status laq_park(laq_context * laq, int32_t seq_id, laq_parked ** out) {
    return laq_guarded([&] {
        laq_check_seq(laq, seq_id);
        laq_check(out, "out must not be NULL");
        *out = &park(*laq, seq_id);
    });
}

laq_status laq_resume(laq_context * laq, int32_t seq_id, laq_parked * parked) {
    return laq_guarded([&] {
        const size_t i = index_of(laq, parked);
        laq_check_seq(laq, seq_id);
        resume(*laq, seq_id, *parked);
        laq->parked.erase(laq->parked.begin() + i);
    });
}

laq_status laq_forget(laq_context * laq, laq_parked * parked) {
    return laq_guarded([&] { laq->parked.erase(laq->parked.begin() + index_of(laq, parked)); });
}

laq_status laq_get_parked(const laq_context * laq, const laq_parked * parked, laq_parked_info * info) {
    return laq_guarded([&] {
        const laq_parked & p = *laq->parked[index_of(laq, parked)];
        laq_check(info && info->size >= sizeof(uint32_t), "info is NULL or info->size is not set");

        laq_parked_info res = {};
        res.size            = info->size;
        res.n_tokens        = p.n_tokens;
        res.n_resident      = p.n_resident;
        res.pending         = p.seq.phase.is(laq_phase::WAITING);
        res.bytes           = p.state.size() + (p.archive ? p.archive->bytes_in_memory() : 0);
        res.file_bytes      = p.archive ? p.archive->bytes_in_file() : 0;
        memcpy(info, &res, std::min<size_t>(info->size, sizeof(res)));
    });
}
