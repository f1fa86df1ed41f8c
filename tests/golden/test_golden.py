"""Has the reference changed? The golden file is checked here and written only by its command."""

from pathlib import Path

import numpy as np
import pytest

import make_golden
from tolerances import describe, nmse

GOLDEN = Path(__file__).with_name("reference.npz")


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN, allow_pickle=False) as stored:
        return dict(stored)


def test_header(golden) -> None:
    assert str(golden["magic"]) == make_golden.MAGIC
    assert int(golden["version"]) == make_golden.VERSION
    assert str(golden["command"]) == f"python scripts/make_golden.py --seed {golden['seed']}"
    assert GOLDEN.stat().st_size < 1_000_000


def test_reference_is_unchanged(golden) -> None:
    given = {name: array for name, array in golden.items() if name.startswith("in_")}
    header = {"magic", "version", "seed", "command"}
    stored = {name for name in golden if name not in given and name not in header}
    computed = make_golden.outputs(given)
    changed = []
    if set(computed) != stored:
        changed.append(f"names: {sorted(set(computed) ^ stored)}")
    for name in sorted(set(computed) & stored):
        want, got = golden[name], computed[name]
        exact = name.startswith(("kept_", "plans", "random", "pooled_max"))
        same = want.shape == got.shape and want.dtype == got.dtype
        # scores go through exp and a matrix product, whose last bit is the platform's
        if not same or not (np.array_equal(want, got) if exact else nmse(got, want) <= 1e-12):
            changed.append(f"{name}: {describe(got, want)}")
    assert not changed, (
        "the reference no longer gives what the golden file holds:\n  "
        + "\n  ".join(changed)
        + f"\nif that is meant: {golden['command']}"
    )
