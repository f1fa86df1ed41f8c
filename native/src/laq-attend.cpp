// Attention to what left the cells. While a prompt is read, and while it is looked ahead from its end, the model's own
// attention gets K and V of all tokens: a column for each position below n_intact, from the archive, and one for each cell.
// They are brought together for one layer at a time, in the buffers that graphs compute in.

#include "laq-cache.h"
#include "laq-graph.h"
#include "laq-move.h"
#include "laq-recall.h"

#include "ggml-backend.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-memory.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>

bool laq_choose_attend(const laq_cache & laq) {
    if (laq.params.recall_read == LAQ_RECALL_READ_CELLS) {
        return false;
    }
    for (uint32_t ikv = 0; ikv < laq.layers.size(); ++ikv) {
        for (const ggml_tensor * t : { laq.k(ikv), laq.v(ikv) }) {
            if (ggml_backend_buffer_is_host(t->buffer)) {
                continue;
            }
            if (laq.params.recall_read == LAQ_RECALL_READ_ARCHIVE) {
                throw laq_error(LAQ_STATUS_UNSUPPORTED, "recall_read = archive: the cells of a layer are on a device; "
                                                        "use recall_read = auto or cells, or n_gpu_layers = 0");
            }
            return false;
        }
    }
    return true;
}

bool laq_cache::may_attend(int32_t seq_id) const {
    const bool is_due = can_attend && may_recall(seq_id, LAQ_RECALL_TURN) && laq_policy_needs_queries(params);
    if (!is_due || !recall->archive.can_hold()) {
        return false;
    }
    const uint64_t n = recall->archive.n_archived() / recall->archive.rows_of_token();
    return n == (uint64_t) seqs[seq_id].n_intact;
}

bool laq_cache::attends(const llama_ubatch & ubatch) const {
    const laq_seq & seq = seqs[0];
    return reserving || (seq.attending && seq.n_intact > 0 && !probing && ubatch.n_tokens <= N_ATTEND && may_attend(0));
}

uint32_t laq_cache::n_attended_to() const {
    const int32_t n = reserving ? (int32_t) n_ctx : seqs[0].n_intact;
    return GGML_PAD(n, laq_archive::N_BLOCK);
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
    attend_input(laq_cache & laq, int64_t n_old, int64_t n_kv) : laq(laq), n_old(n_old), n_kv(n_kv) {}

    void set_input(const llama_ubatch * ubatch) override;
    bool can_reuse(const llm_graph_params & params) override;

    // columns of a block that is lost are not seen by the layers that come
    void hide(uint32_t block);

    void set(int64_t token, int64_t column, bool visible) const;

    laq_cache &   laq;
    const int64_t n_old;           // columns of the archive
    const int64_t n_kv;            // columns of the cells
    ggml_tensor * mask = nullptr;  // F16 or F32 [n_old + n_kv, n_tokens]
    std::mutex    mutex;           // of what reads from the archive's file

    std::vector<std::unique_ptr<attend_part>> parts;
};

}  // namespace

void attend_input::set(int64_t token, int64_t column, bool visible) const {
    char * at = (char *) mask->data + token * mask->nb[1] + column * mask->nb[0];
    if (mask->type == GGML_TYPE_F16) {
        *(ggml_fp16_t *) at = visible ? 0 : 0xFC00;  // 0 and -inf
    } else {
        *(float *) at = visible ? 0.0f : -INFINITY;
    }
}

void attend_input::set_input(const llama_ubatch * ubatch) {
    GGML_ASSERT(ggml_backend_buffer_is_host(mask->buffer));
    const laq_archive &    archive  = laq.recall->archive;
    const int32_t          n_intact = laq.seqs[0].n_intact;
    const llama_kv_cells & cells    = laq.cells();
    for (int64_t p = 0; p < n_old; ++p) {
        set(0, p, p < n_intact && archive.has(p));
    }
    for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
        if (i > 0) {  // the archive is before all of them
            memcpy((char *) mask->data + i * mask->nb[1], mask->data, n_old * mask->nb[0]);
        }
        for (int64_t c = 0; c < n_kv; ++c) {
            const bool whole = !cells.is_empty(c) && cells.pos_get(c) >= n_intact;
            set(i, n_old + c, whole && cells.pos_get(c) <= ubatch->pos[i]);
        }
    }
    laq.stats.n_attended += ubatch->n_tokens;
}

bool attend_input::can_reuse(const llm_graph_params & params) {
    const auto * mctx = static_cast<const llama_kv_cache_context *>(params.mctx);
    return params.cparams.laq == &laq && laq.n_attended_to() == n_old && mctx->get_n_kv() == n_kv &&
           mask->ne[1] == params.ubatch.n_tokens;
}

void attend_input::hide(uint32_t block) {
    for (int64_t i = 0; i < mask->ne[1]; ++i) {
        for (int64_t p = 0; p < laq_archive::N_BLOCK; ++p) {
            set(i, block * laq_archive::N_BLOCK + p, false);
        }
    }
}

static uint8_t * row_of(const ggml_tensor * dst, int64_t column, uint32_t h) {
    return (uint8_t *) dst->data + column * dst->nb[2] + h * dst->nb[1];
}

static void copy_block(const ggml_tensor * dst, const uint8_t * src, ggml_type type, int64_t column) {
    const size_t n_row = ggml_row_size(type, dst->ne[0]);
    for (int64_t h = 0; h < dst->ne[1]; ++h) {
        for (int64_t i = 0; i < laq_archive::N_BLOCK; ++i) {
            uint8_t * to = row_of(dst, column + i, h);
            laq_convert(type, src + (h * laq_archive::N_BLOCK + i) * n_row, dst->type, to, dst->ne[0]);
        }
    }
}

static void fill_block(ggml_tensor * dst, const attend_part & a, uint32_t block) {
    laq_recall_state & r      = *a.input.laq.recall;
    const int64_t      column = (int64_t) block * laq_archive::N_BLOCK;

    std::vector<uint8_t>         read;
    std::unique_lock<std::mutex> lock(a.input.mutex, std::defer_lock);
    if (!r.archive.in_memory(block)) {
        lock.lock();
    }
    const uint8_t * src = block < r.archive.n_blocks() && r.archive.has_block(block)
                              ? r.archive.part(block, a.ikv, a.part, read)
                              : nullptr;
    if (src) {
        copy_block(dst, src, r.type[a.part], column);
        return;
    }
    a.input.hide(block);
    memset(row_of(dst, column, 0), 0, laq_archive::N_BLOCK * dst->nb[2]);
}

static void fill_cells(ggml_tensor * dst, const attend_part & a, uint32_t first, uint32_t last) {
    const laq_cache &    laq = a.input.laq;
    laq_host_buffer      none;  // the host sees all of it
    const laq_cell_rows  cells(laq, a.ikv, a.part == 1, first, last, none);
    std::vector<uint8_t> turned(cells.row_size());
    for (uint32_t c = first; c < last; ++c) {
        for (int64_t h = 0; h < dst->ne[1]; ++h) {
            memcpy(row_of(dst, a.input.n_old + c, h), cells.row(h, c, turned.data()), cells.row_size());
        }
    }
}

// by all threads of the CPU's backend
static void fill(ggml_tensor * dst, int ith, int nth, void * data) {
    const attend_part & a        = *(const attend_part *) data;
    const int64_t       n_blocks = a.input.n_old / laq_archive::N_BLOCK;
    for (int64_t b = ith; b < n_blocks; b += nth) {
        fill_block(dst, a, b);
    }
    fill_cells(dst, a, a.input.n_kv * ith / nth, a.input.n_kv * (ith + 1) / nth);
}

static attend_input * input_of(laq_cache & laq, const llm_graph_context & gctx, int64_t n_kv) {
    for (const auto & input : gctx.res->inputs) {
        if (auto * found = dynamic_cast<attend_input *>(input.get())) {
            return found;
        }
    }
    auto          input = std::make_unique<attend_input>(laq, laq.n_attended_to(), n_kv);
    const int64_t n     = input->n_old + n_kv;
    input->mask =
        ggml_new_tensor_4d(gctx.ctx0, gctx.cparams.flash_attn ? GGML_TYPE_F16 : GGML_TYPE_F32, n, gctx.n_tokens, 1, 1);
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
    attend_input * input = input_of(laq, gctx, k->ne[2]);
    const int64_t  n     = input->n_old + input->n_kv;
    const uint32_t ikv   = it - laq.layers.begin();

    const auto all = [&](ggml_tensor * cells, int part, int64_t n_embd_head) {
        input->parts.push_back(std::make_unique<attend_part>(attend_part{ *input, ikv, part }));
        ggml_tensor * args[] = { cells };
        return ggml_custom_4d(gctx.ctx0, cells->type, n_embd_head, it->n_head_kv, n, 1, args, 1, fill, GGML_N_TASKS_MAX,
                              input->parts.back().get());
    };
    k       = all(k, 0, it->n_embd_head_k);
    v       = all(v, 1, it->n_embd_head_v);
    kq_mask = input->mask;
}

void laq_graph_reserve_attend(laq_cache & laq) {
    llama_context & ctx  = *laq.ctx;
    const auto      mctx = ctx.get_memory()->init_full();
    const uint32_t  n    = std::min(ctx.n_ubatch(), laq_cache::N_ATTEND);

    laq.reserving          = true;
    const ggml_cgraph * gf = ctx.graph_reserve(n, 1, n, mctx.get());
    laq.reserving          = false;
    if (!gf) {
        throw laq_error(LAQ_STATUS_NO_MEMORY,
                        "no memory for attention to the archive: use a smaller n_ctx, or recall_read = cells");
    }
    ctx.get_gf_res_reserve()->reset();
}
