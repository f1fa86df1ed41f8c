"""The case table covers what it says."""

import itertools

import cases


def test_every_pair_of_values_occurs() -> None:
    dimensions = {
        "type_k": cases.K_TYPES,
        "n_group": cases.GROUPS,
        "d": cases.HEAD_SIZES,
        "n_queries": cases.N_QUERIES,
        "n_kv": cases.N_KV,
        "mask": cases.MASKS,
        "softcap": cases.SOFTCAPS,
        "sinks": cases.SINKS,
    }
    missing = []
    for (a, a_values), (b, b_values) in itertools.combinations(dimensions.items(), 2):
        seen = {(getattr(case, a), getattr(case, b)) for case in cases.SCORE_CASES}
        wanted = set(itertools.product(a_values, b_values))
        if {a, b} == {"type_k", "d"}:
            wanted = {pair for pair in wanted if cases.fits(*pair)}
        missing += [(a, b, *pair) for pair in sorted(wanted - seen, key=str)]
    assert not missing


def test_every_cache_type_is_evicted_with_every_group() -> None:
    seen_k = {(c.type_k, c.n_group, c.flash_attn) for c in cases.EVICT_CASES}
    seen_v = {(c.type_v, c.n_group, c.flash_attn) for c in cases.EVICT_CASES}
    every = set(itertools.product(cases.K_TYPES, cases.GROUPS, (True, False)))
    assert every == seen_k
    assert seen_v == {(t, g, fa) for t, g, fa in every if fa or t not in cases.BLOCK_TYPES}
