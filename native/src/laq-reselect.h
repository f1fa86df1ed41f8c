#pragma once

// What a choice from archived and resident tokens together is made with. Internal to laq-reselect.cpp and
// laq-observe.cpp.

#include "laq-cache.h"
#include "laq-recall.h"

// one part of a layer in the blocks of the archive: where each begins
struct laq_archive_part {
    std::vector<std::vector<uint8_t>> from_file;
    std::vector<const uint8_t *>      base;

    // false: a block was lost
    bool read(laq_archive & archive, uint32_t ikv, int part, const std::vector<uint8_t> & wanted) {
        from_file.resize(wanted.size());
        base.assign(wanted.size(), nullptr);
        for (uint32_t i = 0; i < wanted.size(); ++i) {
            if (wanted[i] && !(base[i] = archive.part(i, ikv, part, from_file[i]))) {
                return false;
            }
        }
        return true;
    }

    const uint8_t * row(uint32_t head, int32_t pos, size_t size) const {
        const int32_t n = laq_archive::N_BLOCK;
        return base[pos / n] + ((size_t) head * n + pos % n) * size;
    }
};

// K (part 0) and V of a layer there; V only where it is needed
using laq_archived_layer = laq_archive_part[2];

// the archived rows that come back to one layer: K and V of each head, in the cache's type and in order of position
struct laq_recalled_layer {
    std::vector<std::vector<uint8_t>> bytes[2];
};

// what the keys of a layer are scored by
struct laq_layer_queries {
    size_t             n_q;
    std::vector<float> queries;  // [n_head][n_q][n_embd_head]
    std::vector<float> sinks;    // [n_head], or empty

    laq_layer_queries(const laq_cache & laq, uint32_t ikv, const std::vector<laq_observation> & obs);
};

// of the rows that the budget takes, those that are resident
struct laq_overlap {
    size_t n_same = 0;
    size_t n_all  = 0;
};

using laq_rows_of_layer = laq_rows::value_type;

// a re-selection while it is made
struct laq_reselection {
    laq_cache &                          laq;
    const laq_eviction &                 e;
    const std::vector<uint32_t> &        order;
    const std::vector<laq_observation> & obs;

    const bool fits;

    std::vector<laq_observation> fitted;  // of these, those that values are fitted to: the last ones, or none
    bool weighs = false;                  // what they get from all tokens is not known, values are needed for that

    laq_params           params;
    std::vector<int32_t> archived;
    std::vector<uint8_t> blocks;  // 1 = of the archive's blocks, one that holds an archived token
    std::vector<float>   mask;    // [n_q][n_kv] of the head that `masked` are the positions of
    std::vector<int32_t> masked;
    uint64_t             mask_id = 0;
    laq_overlap          old;  // in the first layers

    laq_rows                                     rows;
    std::vector<laq_recalled_layer>              recalled;
    std::vector<std::vector<std::vector<float>>> scores;      // per layer and head
    laq_rows                                     candidates;  // while debugging

    enum class result { DONE, SAME, LOST };

    laq_reselection(laq_cache & laq, const laq_eviction & e, const std::vector<uint32_t> & order,
                    const std::vector<laq_observation> & obs, bool fits) :
        laq(laq), e(e), order(order), obs(obs), fits(fits), params(laq.params_of(e.seq_id)) {}

    result run();
    result observe_all();
    void   keep_scores() const;

    // the rows, and behind them what was decoded ahead where values are fitted: the queries see it
    laq_rows with_ahead() const;

    // the rows that come back go to the cells that were prepared for them
    void upload(const std::vector<uint32_t> & dst) const;

    // whether K (part 0) or V of a selected row is read from the archive: V that was fitted is not what it was
    bool comes_back(int part, const laq_row & row) const;

  private:
    void     begin();
    uint32_t n_ahead() const;
    // at most, of one head
    size_t   n_candidates() const { return archived.size() + order.size(); }
    uint32_t n_kept();
    // what the heads of a layer may choose from, and what is archived of it; false: a block was lost
    bool                 begin_layer(uint32_t ikv, laq_archived_layer & archive, laq_rows_of_layer & of_heads) const;
    std::vector<laq_row> candidates_of(uint32_t ikv, uint32_t h) const;
    bool                 is_masked(const std::vector<laq_row> & rows) const;
    void                 set_mask(const std::vector<laq_row> & rows);
    laq_head_op op_of(const std::vector<laq_row> & rows, uint32_t ikv, uint32_t h, const laq_layer_queries & by) const;
    std::vector<float> remembered(const std::vector<laq_row> & of_head, uint32_t ikv, uint32_t h) const;
    // the scores of a layer; where values are fitted, what the queries get goes to the ring
    void                 score(uint32_t ikv, const laq_rows_of_layer & of_heads, const laq_archived_layer & archive);
    laq_overlap          choose(uint32_t ikv, uint32_t h, const std::vector<laq_row> & of_head);
    std::vector<uint8_t> blocks_of_values(uint32_t ikv) const;
    bool                 fetch(uint32_t ikv, laq_archived_layer & archive);
    result               run_layer(uint32_t ikv);
};

// K (part 0) or V of what the heads of a layer may choose from, as it was before any fit: brought together in one type
class laq_candidate_rows {
  public:
    // fetched is this one's alone
    laq_candidate_rows(const laq_reselection & s, uint32_t ikv, int part, const laq_archive_part & archived,
                       laq_host_buffer & fetched);

    ggml_type type() const { return to; }

    size_t row_size() const { return n_row; }

    // rows [first, last) of a head, one after the other; by several threads at once
    void gather(const laq_row * first, const laq_row * last, uint32_t h, uint8_t * dst) const;

  private:
    const laq_reselection &  s;
    const laq_archive_part & archived;
    const laq_cell_rows      cells;
    const int                part;
    const int64_t            n;  // values of a row
    const ggml_type          type_cells, type_archive, to;
    const size_t             n_archived;  // bytes of an archived row
    const size_t             n_row;
};

// What the queries that values are fitted to get from all that the heads of a layer may choose from.
class laq_layer_outputs {
  public:
    laq_layer_outputs(const laq_reselection & s, uint32_t ikv, const laq_archive_part & values);

    // let the op of a head give them
    void ask(laq_head_op & op);
    // while the op's keys are brought together
    void gather(const std::vector<laq_row> & of_head, uint32_t h, int64_t i0, int64_t i1);
    // once it is done
    void take(const laq_head_op & op, uint32_t h);
    // to the ring
    void keep() const;

  private:
    const laq_reselection &         s;
    const uint32_t                  ikv;
    const laq_candidate_rows        values;
    std::vector<uint8_t>            of_head;  // values
    std::vector<float>              of_op;    // [n_group][n_q][n_embd_head_v]
    std::vector<std::vector<float>> outs;     // of each query: [n_head][n_embd_head_v]
};
