"""Finding one sentence in an essay: what an evicted cache finds of what the full cache finds."""

from collections.abc import Callable
from pathlib import Path

import pytest

from integration.decoding import greedy, open_llama
from integration.needles import make_needle

N_NEEDLES = 20
N_WORDS = 1150  # about 1,400 tokens
BUDGET = 128
#: last tokens of a prompt that the evicted cache reads itself
N_OWN = 64


@pytest.mark.slow
@pytest.mark.model
def test_laq_finds_what_the_full_cache_finds(
    smollm2: Path, record_property: Callable[[str, object], None]
) -> None:
    settings = {"n_ctx": 2048, "n_batch": 512, "kv_budget": BUDGET, "lookahead": "pseudo",
                "kv_staging": 2048}  # fmt: skip
    full = open_llama(smollm2, kv_policy="full", **settings)
    evicted = open_llama(smollm2, **settings)
    found = {"full": 0, "laq++": 0}
    for index in range(N_NEEDLES):
        needle = make_needle(index, N_WORDS)
        prompt = full.tokenize(f"{needle.document}{needle.question}".encode())
        # the essay is read once; the evicted cache reads the end of the prompt, and evicts there
        full.reset()
        full.eval(prompt[:-N_OWN])
        evicted.load_state(full.save_state())
        found["full"] += needle.answer.encode() in full.detokenize(greedy(full, prompt, 12))
        found["laq++"] += needle.answer.encode() in full.detokenize(greedy(evicted, prompt, 12))
        stats = evicted.kv_stats()
        assert stats.n_resident == BUDGET + 11, "11 answer tokens were decoded"
        assert stats.n_tokens == len(prompt) + 11 > 10 * BUDGET
    for policy, count in found.items():
        record_property(f"found_{policy}", count)
    report = f"of {N_NEEDLES} needles at budget {BUDGET}: {found}"
    assert found["full"] >= 0.8 * N_NEEDLES, report
    assert found["laq++"] >= 0.9 * found["full"], report
