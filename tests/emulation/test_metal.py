"""laq-score.metal and its host side, on the emulator, against numpy; and that mistakes are seen."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

import cases
from emulation.metal import kernel
from parity.rows import encode, ggml_type
from tolerances import SCORE_NMSE, assert_nmse, nmse

# what SCORE_CASES lacks: more head sizes, rows that are not whole blocks, many rows, many chunks
HEAD_SIZES = (64, 96, 112, 192, 576)
EXTRA_CASES = (
    *(
        cases.ScoreCase(type_k, 4, d, 9, 131, "bias", 0.0, True)
        for type_k, d in itertools.product(("f32", "bf16", "q8_0", "q5_0"), HEAD_SIZES)
        if cases.fits(type_k, d)
    ),
    cases.ScoreCase("f16", 8, 32, 67, 45, "causal", 0.0, False),
    cases.ScoreCase("q4_0", 1, 32, 1, 17_000, "none", 0.0, True),
)
PLAIN = cases.ScoreCase("f16", 3, 64, 5, 300, "bias", 3.0, True)


@pytest.fixture(scope="module")
def library():
    return kernel.load()


def reference(case, inputs, k=None):
    """Scores by numpy, of the keys as type_k has them."""
    k = encode(inputs.k, case.type_k)[1] if k is None else k
    return cases.expected_scores(case, inputs, k)


def check(actual, expected, case) -> None:
    assert_nmse(actual, expected, SCORE_NMSE[case.type_k, "metal"], case)


@pytest.mark.parametrize("case", cases.SCORE_CASES + EXTRA_CASES, ids=str)
def test_scores(library, case) -> None:
    inputs = cases.score_inputs(case)
    check(kernel.score(library, case, inputs, seed=1), reference(case, inputs), case)


@pytest.mark.parametrize("d", (64, 192, 576))
def test_order_of_threads_does_not_change_a_bit(library, d) -> None:
    case = replace(PLAIN, d=d)
    inputs = cases.score_inputs(case)
    runs = [kernel.score(library, case, inputs, seed=seed) for seed in range(4)]
    assert all((run == runs[0]).all() for run in runs)


@pytest.mark.parametrize("type_k", cases.K_TYPES)
def test_views(library, type_k) -> None:
    # heads of a wider cell, and queries as the model has them: [d, n_head, n_q]
    case = replace(PLAIN, type_k=type_k)
    inputs = cases.score_inputs(case)
    rows = encode(inputs.k, type_k)[0].reshape(case.n_kv, case.n_head_kv, -1)
    n = rows.shape[2]
    cells = np.full((case.n_kv, case.n_head_kv + 2, n), 0xFF, np.uint8)
    cells[:, : case.n_head_kv] = rows
    actual = kernel.score(
        library, case, inputs, seed=2,
        q=inputs.q.transpose(1, 0, 2), nbq1=4 * case.d * case.n_head, nbq2=4 * case.d,
        k_bytes=cells, nbk1=n * (case.n_head_kv + 2), nbk2=n,
    )  # fmt: skip
    check(actual, reference(case, inputs), case)


@pytest.mark.parametrize("sinks", (False, True))
def test_hidden_keys_and_blind_queries(library, sinks) -> None:
    case = replace(PLAIN, sinks=sinks, softcap=0.0)
    inputs = cases.score_inputs(case)
    inputs.mask[1] = -np.inf
    inputs.mask[:, 100:140] = -np.inf
    # cells that nobody has written to may hold anything
    k = np.array(encode(inputs.k, "f16")[1])
    dirty = k.astype(np.float16)
    dirty[100:140] = np.nan
    actual = kernel.score(library, case, inputs, seed=3, k_bytes=dirty.view(np.uint8))
    check(actual, reference(case, inputs, k), case)
    assert (actual[:, 100:140] == 0).all()


def test_large_logits(library) -> None:
    case = replace(PLAIN, softcap=0.0)
    inputs = cases.score_inputs(case)
    inputs.q[:] *= 40
    check(kernel.score(library, case, inputs, seed=4), reference(case, inputs), case)


@pytest.mark.parametrize(
    "case, changes",
    [
        (PLAIN, {"type_k": ggml_type("iq4_nl")}),
        (PLAIN, {"type_k": ggml_type("q4_k")}),
        (replace(PLAIN, d=40), {}),
        (PLAIN, {"nbk1": 64 * 2 * 3 + 4}),
        (PLAIN, {"nbk2": 64 * 2 + 2}),
        (PLAIN, {"max_smem": 14 * 1024 - 1}),
    ],
    ids=("iq4_nl", "q4_k", "d40", "cell stride", "head stride", "little memory"),
)
def test_refused(library, case, changes) -> None:
    with pytest.raises(kernel.Refused):
        kernel.score(library, case, cases.score_inputs(case), **changes)


#
# mistakes
#

PROBES = (
    cases.ScoreCase("f16", 3, 32, 3, 139, "bias", 3.0, True),  # parts of a tile, 5 chunks' tiles
    cases.ScoreCase("f16", 1, 32, 1, 1100, "none", 0.0, False),  # more parts than lanes merge
    cases.ScoreCase("f16", 3, 576, 3, 30, "causal", 0.0, False),  # tiles of 8 keys
    cases.ScoreCase("f16", 4, 64, 16, 70, "causal", 0.0, True),  # two blocks of rows a SIMD group
)
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
EDITS = {
    # barriers
    "tile is not complete": (
        f"laq_load_tile<load>(args, k, sk, i0, tiitg);\n\n        {BARRIER}",
        "laq_load_tile<load>(args, k, sk, i0, tiitg);",
    ),
    "tile is still read": (f"{BARRIER}\n\n        if (SUM) {{", "if (SUM) {"),
    "logits are not stored": (
        "LAQ_SCORE_LDX, 0, false);\n    }\n    simdgroup_barrier(mem_flags::mem_threadgroup);",
        "LAQ_SCORE_LDX, 0, false);\n    }",
    ),
    "kernels overlap": (
        "ggml_metal_encoder_memory_barrier(enc);\n\n"
        '    ggml_metal_encoder_set_pipeline(enc, pipeline_of(lib, "merge"',
        'ggml_metal_encoder_set_pipeline(enc, pipeline_of(lib, "merge"',
    ),
    # indices
    "K is not transposed": ("ldk, 0, true", "ldk, 0, false"),
    "part of the tile": ("sk + part*8*KM*(args.n_embd", "sk + 0*8*KM*(args.n_embd"),
    "statistics of a part": ("(chunk*args.n_split + part)", "(chunk*args.n_split)"),
    "mask of another key": ("LDX + 4*t + sub], i0 + 4*t + sub)", "LDX + 4*t + sub], i0 + 4*t)"),
    "mask of another query": ("j += STEP", "j += 0*STEP"),
    "queries of another head": ("(g*args.n_group + r/args.n_q)*args.nbq2", "g*args.nbq2"),
    "sink of another head": ("sinks[g*args.n_group + r/args.n_q]", "sinks[g*args.n_group]"),
    "log-sum-exp of another head": ("lse   += g*args.n_rows_pad", "lse   += 0*g"),
    "another head of K": ("k     += g*args.nbk2", "k     += 0*g"),
    # sums
    "half of the lanes": ("max(top, simd_shuffle_xor(top, 2))", "max(top, top)"),
    "sum of half of the lanes": ("sum += simd_shuffle_xor(sum, 2);", ""),
    "chunks left out": ("p < n_parts; p += 32", "p < n_parts; p += 64"),
    "first 32 chunks only": ("p < n_parts; p += 32", "p < min(n_parts, 32); p += 32"),
    "sum is not rescaled": ("old.y*exp(old.x - top_new)", "old.y"),
    "nothing to begin with": ("i0 == start, tiisg", "false, tiisg"),
    "every tile begins": ("i0 == start, tiisg", "true, tiisg"),
    "rows that are none": ("r < args.n_rows ? top + log(sum)", "true ? top + log(sum)"),
    "sums of a part": ("l < 32; l += n_part", "l < 32; l += 32"),
    "sums of other parts": ("sg += args.n_split", "sg += 1"),
    "mean": ("sum/args.n_group", "sum"),
    # the formula
    "no soft-cap": ("x = args.softcap*precise::tanh(x)", "x *= 1.0f"),
    "no sink": ("sum*exp(top - top_new) + exp(sink - top_new)", "sum*exp(top - top_new)"),
    "hidden keys count": ("x > LAQ_HIDDEN ? exp(x - lse[r]) : 0.0f", "exp(x - lse[r])"),
    # the host
    "scale of the soft-cap": ("scale / softcap", "scale"),
    "little group memory": ("n_logits + 32 * LAQ_SCORE_NSG", "n_logits"),
}  # fmt: skip


def fault(library) -> str | None:
    """The first thing that is wrong with a kernel."""
    for case, seed in itertools.product(PROBES, (1, 2)):
        inputs = cases.score_inputs(case)
        if inputs.mask is not None:
            inputs.mask[0] = -np.inf
        try:
            error = nmse(kernel.score(library, case, inputs, seed=seed), reference(case, inputs))
        except kernel.Failed as failed:
            return f"{case}: {failed}"
        if not error <= SCORE_NMSE[case.type_k, "metal"]:
            return f"{case}: NMSE {error:.3g}"
    return None


def test_probes_find_nothing() -> None:
    assert fault(kernel.load(types=("f16",))) is None


@pytest.mark.parametrize("name", EDITS)
def test_mistakes_are_seen(name) -> None:
    assert fault(kernel.load(EDITS[name], types=("f16",)))


BLOCK_EDITS = {
    "q8_0": ("2 + 16*(c%2)", "2"),
    "bf16": ("(uint) x.z << 16", "(uint) x.y << 16"),
    "q4_0": ("-8.0f*d", "-7.0f*d"),
    "q4_1": ("(block + 4), 0, c%2", "(block + 4), 0, 0"),
    "q5_0": ("qh >>= 16*upper", "qh >>= 8*upper"),
    "q5_1": ("(device const ushort *) (block + 4);", "(device const ushort *) (block + 2);"),
}  # fmt: skip


@pytest.mark.parametrize("type_k", BLOCK_EDITS)
def test_wrong_blocks_are_seen(type_k) -> None:
    library = kernel.load(BLOCK_EDITS[type_k], types=("f16", type_k))
    case = replace(PLAIN, type_k=type_k)
    inputs = cases.score_inputs(case)
    actual = kernel.score(library, case, inputs)
    assert not nmse(actual, reference(case, inputs)) <= SCORE_NMSE[type_k, "metal"]
