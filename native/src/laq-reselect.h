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

  private:
    void     begin();
    uint32_t n_ahead() const;
    // at most, of one head
    size_t n_candidates() const { return archived.size() + order.size(); }
    // what the heads of a layer may choose from, and the archived keys; false: a block was lost
    bool                 begin_layer(uint32_t ikv, laq_archive_part & keys, laq_rows_of_layer & of_heads) const;
    uint32_t             n_kept();
    bool                 comes_back(int part, const laq_row & row) const;
    std::vector<laq_row> candidates_of(uint32_t ikv, uint32_t h) const;
    void gather(const laq_row * first, const laq_row * last, uint32_t ikv, uint32_t h, const laq_archive_part & keys,
                const laq_cell_rows & cells, uint8_t * dst) const;
    bool is_masked(const std::vector<laq_row> & rows) const;
    void set_mask(const std::vector<laq_row> & rows);
    laq_head_op op_of(const std::vector<laq_row> & rows, uint32_t ikv, uint32_t h, const laq_layer_queries & by) const;
    std::vector<float> remembered(const std::vector<laq_row> & of_head, uint32_t ikv, uint32_t h) const;
    void               score(uint32_t ikv, const laq_rows_of_layer & of_heads, const laq_archive_part & keys);
    laq_overlap        choose(uint32_t ikv, uint32_t h, const std::vector<laq_row> & of_head);
    bool               fetch(uint32_t ikv, const laq_archive_part & keys);
    void gather_values(const std::vector<laq_row> & of_head, uint32_t ikv, uint32_t h, const laq_archive_part & values,
                       const laq_cell_rows & cells, std::vector<float> & dst) const;
    bool observe(uint32_t ikv, const laq_rows_of_layer & of_heads, const laq_archive_part & keys);
    result run_layer(uint32_t ikv);
};
