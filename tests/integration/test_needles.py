"""Finding one sentence in an essay: what an evicted cache finds of what the full cache finds."""

from collections.abc import Callable
from pathlib import Path

import pytest

from integration.decoding import greedy, open_llama
from integration.needles import make_needle

N_NEEDLES = 20
N_WORDS = 1150  # about 1,400 tokens
BUDGET = 128
POLICIES = ("laq++", "snapkv", "streaming")
#: last tokens of a prompt that every policy reads itself; snapkv looks at the last 32
N_OWN = 64


@pytest.mark.slow
@pytest.mark.model
def test_laq_finds_what_the_full_cache_finds(
    smollm2: Path, record_property: Callable[[str, object], None]
) -> None:
    settings = {"n_ctx": 2048, "n_batch": 512, "kv_budget": BUDGET, "lookahead": "pseudo",
                "kv_staging": 2048}  # fmt: skip
    full = open_llama(smollm2, kv_policy="full", **settings)
    evicted = {p: open_llama(smollm2, kv_policy=p, **settings) for p in POLICIES}
    found = dict.fromkeys(("full", *POLICIES), 0)
    for index in range(N_NEEDLES):
        needle = make_needle(index, N_WORDS)
        prompt = full.tokenize(f"{needle.document}{needle.question}".encode())
        # the essay is read once; each policy reads the end of the prompt, and evicts there
        full.reset()
        full.eval(prompt[:-N_OWN])
        state = full.save_state()
        found["full"] += needle.answer.encode() in full.detokenize(greedy(full, prompt, 12))
        for policy, llm in evicted.items():
            llm.load_state(state)
            answer = llm.detokenize(greedy(llm, prompt, 12))
            found[policy] += needle.answer.encode() in answer
            stats = llm.kv_stats()
            assert stats.n_resident == BUDGET + 11, "11 answer tokens were decoded"
            assert stats.n_tokens == len(prompt) + 11 > 10 * BUDGET
    for policy, count in found.items():
        record_property(f"found_{policy}", count)
    report = f"of {N_NEEDLES} needles at budget {BUDGET}: {found}"
    assert found["full"] >= 0.8 * N_NEEDLES, report
    assert found["laq++"] >= 0.9 * found["full"], report
