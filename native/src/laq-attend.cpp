// Attention to what left the cells. While a prompt is read, and while it is looked ahead from its end, the model's own
// attention gets K and V of all tokens: a column for each position, from the archive below n_intact and from the cells from
// there on. That is what a cache with room for all of them would give it, in the same order: so are the results, to the bit.
// The columns are brought together for one layer at a time, in the buffers that graphs compute in: by the CPU, to which the
// scheduler brings what the cells have, and from which it takes the columns to where the layer is.

#include "laq-cache.h"
#include "laq-graph.h"
#include "laq-recall.h"

#include "ggml-backend.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-memory.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>

// Most tokens that attend to the archive at once where nothing is moved to a device: the mask of more is larger, and none
// of them is read any faster.
static constexpr uint32_t N_ATTEND = 128;

static bool is_in_host_memory(const laq_cache & laq) {
    for (uint32_t ikv = 0; ikv < laq.layers.size(); ++ikv) {
        if (!ggml_backend_buffer_is_host(laq.k(ikv)->buffer) || !ggml_backend_buffer_is_host(laq.v(ikv)->buffer)) {
            return false;
        }
    }
    return true;
}

void laq_choose_attend(laq_cache & laq) {
    const bool in_host = is_in_host_memory(laq);
    const int  read    = laq.params.recall_read;

    laq.can_attend     = read == LAQ_RECALL_READ_AUTO ? in_host : read != LAQ_RECALL_READ_CELLS;
    laq.attends_memory = !in_host;
    // to a device goes all of a layer for each ubatch
    laq.n_attend = in_host ? N_ATTEND : laq.ctx->n_ubatch();
}

bool laq_cache::may_attend(int32_t seq_id) const {
    const bool is_due = can_attend && may_recall(seq_id, LAQ_RECALL_TURN) && laq_policy_needs_queries(params);
    return is_due && recall->archive.can_hold() && recall->archive.has_all(seqs[seq_id].n_intact, attends_memory);
}

bool laq_cache::attends(const llama_ubatch & ubatch) const {
    if (reserving) {
        return true;
    }
    const laq_seq & seq = seqs[0];
    if (!seq.attending || seq.n_intact == 0 || probing || ubatch.n_tokens > n_attend || !may_attend(0)) {
        return false;
    }
    // a unified cache takes more sequences than n_seq_max
    return std::all_of(ubatch.seq_id, ubatch.seq_id + ubatch.n_tokens, [](const auto * id) { return id[0] == 0; });
}

uint32_t laq_cache::n_attended_to() const {
    return GGML_PAD(reserving ? (int32_t) n_ctx : n_tokens(0), 256);  // as upstream pads the cells that it looks at
}

namespace {

class attend_input;

// K or V of a layer, of all tokens
struct attend_part {
    attend_input & input;
    uint32_t       ikv;
    int            part;  // 0 = K, 1 = V
};

// What a ubatch sees of the columns. It changes from token to token while the graph stays the same, so it is an input.
class attend_input : public llm_graph_input_i {
  public:
    attend_input(laq_cache & laq, int64_t n) : laq(laq), n(n) {}

    void set_input(const llama_ubatch * ubatch) override;
    bool can_reuse(const llm_graph_params & params) override;

    // columns [first, last) are not seen by any token; by a lost block, in the layers that come
    void hide(int64_t first, int64_t last) const;

    laq_cache &          laq;
    const int64_t        n;               // columns
    std::vector<int32_t> cell;            // [n] that a column is in, -1: the archive, or nothing is there
    ggml_tensor *        mask = nullptr;  // F16 or F32 [n, n_tokens]
    std::mutex           mutex;           // of what reads from the archive's file

    std::vector<std::unique_ptr<attend_part>> parts;
};

}  // namespace

// columns [first, last) of a row of the mask are not seen
static void hide_columns(const ggml_tensor * mask, int64_t token, int64_t first, int64_t last) {
    char * row = (char *) mask->data + token * mask->nb[1];
    if (mask->type == GGML_TYPE_F16) {
        std::fill((ggml_fp16_t *) row + first, (ggml_fp16_t *) row + last, (ggml_fp16_t) 0xFC00);  // -inf
    } else {
        std::fill((float *) row + first, (float *) row + last, -INFINITY);
    }
}

void attend_input::set_input(const llama_ubatch * ubatch) {
    GGML_ASSERT(ggml_backend_buffer_is_host(mask->buffer));
    const int32_t n_intact = laq.seqs[0].n_intact;
    cell.assign(n, -1);
    for (const uint32_t c : laq.resident(0)) {
        const int32_t p = laq.cells().pos_get(c);
        if (p >= n_intact) {
            cell[p] = c;
        }
    }
    memset(mask->data, 0, ggml_nbytes(mask));
    for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
        hide_columns(mask, i, ubatch->pos[i] + 1, n);
    }
    for (int64_t p = 0; p < n; ++p) {
        if (p < n_intact ? !laq.recall->archive.has(p) : cell[p] < 0) {
            hide(p, p + 1);
        }
    }
    laq.stats.n_attended += ubatch->n_tokens;
}

bool attend_input::can_reuse(const llm_graph_params & params) {
    return params.cparams.laq == &laq && laq.n_attended_to() == n && mask->ne[1] == params.ubatch.n_tokens;
}

void attend_input::hide(int64_t first, int64_t last) const {
    for (int64_t i = 0; i < mask->ne[1]; ++i) {
        hide_columns(mask, i, first, last);
    }
}

static uint8_t * row_of(const ggml_tensor * dst, int64_t column, uint32_t h) {
    return (uint8_t *) dst->data + column * dst->nb[2] + h * dst->nb[1];
}

// a block of columns as the archive has it; false: it has none of it
static bool fill_archived(ggml_tensor * dst, const attend_part & a, uint32_t block) {
    laq_recall_state & r     = *a.input.laq.recall;
    const ggml_type    type  = r.type[a.part];
    const size_t       n_row = ggml_row_size(type, dst->ne[0]);
    const int64_t      first = (int64_t) block * laq_archive::N_BLOCK;

    if (first >= a.input.laq.seqs[0].n_intact) {
        return false;
    }
    std::vector<uint8_t>         read;
    std::unique_lock<std::mutex> lock(a.input.mutex, std::defer_lock);
    if (!r.archive.in_memory(block)) {
        lock.lock();
    }
    const uint8_t * src = r.archive.has_block(block) ? r.archive.part(block, a.ikv, a.part, read) : nullptr;
    if (!src) {
        a.input.hide(first, std::min<int64_t>(first + laq_archive::N_BLOCK, a.input.laq.seqs[0].n_intact));
        return false;
    }
    for (int64_t h = 0; h < dst->ne[1]; ++h) {
        for (int64_t i = 0; i < laq_archive::N_BLOCK; ++i) {
            laq_convert(type, src + (h * laq_archive::N_BLOCK + i) * n_row, dst->type, row_of(dst, first + i, h),
                        dst->ne[0]);
        }
    }
    return true;
}

// [n_embd_head, n_head_kv, n_cells], or with the cells first where V is transposed
static void copy_from_cell(ggml_tensor * dst, int64_t column, uint32_t h, const ggml_tensor * cells, int32_t cell) {
    uint8_t *    to   = row_of(dst, column, h);
    const char * from = (const char *) cells->data + h * cells->nb[1];
    if (cells->nb[1] <= cells->nb[2]) {
        memcpy(to, from + cell * cells->nb[2], dst->nb[1]);
        return;
    }
    const size_t n_item = cells->nb[0];
    for (int64_t i = 0; i < dst->ne[0]; ++i) {
        memcpy(to + i * n_item, from + i * cells->nb[2] + cell * n_item, n_item);
    }
}

// a block of columns for each thread of the CPU's backend, and on
static void fill(ggml_tensor * dst, int ith, int nth, void * data) {
    const attend_part & a = *(const attend_part *) data;

    for (int64_t b = ith; b < a.input.n / laq_archive::N_BLOCK; b += nth) {
        const bool archived = fill_archived(dst, a, b);
        for (int64_t p = b * laq_archive::N_BLOCK; p < (b + 1) * laq_archive::N_BLOCK; ++p) {
            if (!archived && a.input.cell[p] < 0) {
                memset(row_of(dst, p, 0), 0, dst->nb[2]);  // it is not seen, but must be finite
            }
            for (int64_t h = 0; h < dst->ne[1] && a.input.cell[p] >= 0; ++h) {
                copy_from_cell(dst, p, h, dst->src[0], a.input.cell[p]);
            }
        }
    }
}

static attend_input * input_of(laq_cache & laq, const llm_graph_context & gctx) {
    for (const auto & input : gctx.res->inputs) {
        if (auto * found = dynamic_cast<attend_input *>(input.get())) {
            return found;
        }
    }
    auto            input = std::make_unique<attend_input>(laq, laq.n_attended_to());
    const ggml_type type  = gctx.cparams.flash_attn ? GGML_TYPE_F16 : GGML_TYPE_F32;
    input->mask           = ggml_new_tensor_4d(gctx.ctx0, type, input->n, gctx.n_tokens, 1, 1);
    ggml_set_input(input->mask);
    ggml_set_name(input->mask, "laq_inp_mask");

    return (attend_input *) gctx.res->add_input(std::move(input));
}

void laq_graph_attend(laq_cache & laq, const llm_graph_context & gctx, ggml_tensor *& k, ggml_tensor *& v,
                      ggml_tensor *& kq_mask, int il) {
    const auto it = std::find_if(laq.layers.begin(), laq.layers.end(), [&](const auto & l) { return l.il == il; });
    if (it == laq.layers.end() || !laq.can_attend || !laq.attends(gctx.ubatch)) {
        return;
    }
    attend_input * input = input_of(laq, gctx);
    const uint32_t ikv   = it - laq.layers.begin();

    const auto all = [&](ggml_tensor * cells, int part, int64_t n_embd_head) {
        input->parts.push_back(std::make_unique<attend_part>(attend_part{ *input, ikv, part }));
        ggml_tensor * args[] = { cells };
        return ggml_custom_4d(gctx.ctx0, cells->type, n_embd_head, it->n_head_kv, input->n, 1, args, 1, fill,
                              GGML_N_TASKS_MAX, input->parts.back().get());
    };
    k       = all(k, 0, it->n_embd_head_k);
    v       = all(v, 1, it->n_embd_head_v);
    kq_mask = input->mask;
}

void laq_graph_reserve_attend(laq_cache & laq) {
    llama_context & ctx  = *laq.ctx;
    const auto      mctx = ctx.get_memory()->init_full();
    const uint32_t  n    = std::min(ctx.n_ubatch(), laq.n_attend);

    laq.reserving          = true;
    const ggml_cgraph * gf = ctx.graph_reserve(n, 1, n, mctx.get());
    laq.reserving          = false;
    if (!gf) {
        throw laq_error(LAQ_STATUS_NO_MEMORY,
                        "no memory for attention to the archive: use a smaller n_ctx, or recall_read = cells");
    }
    ctx.get_gf_res_reserve()->reset();
}
