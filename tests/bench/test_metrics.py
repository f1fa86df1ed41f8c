"""Metrics against examples worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from laq_gguf.bench.metrics import (
    any_found,
    kl_divergence,
    negative_log_likelihood,
    share_found,
    squad_em,
    squad_f1,
    squad_words,
    top1_agreement,
)


def test_share_found_counts_outputs_and_ignores_case() -> None:
    assert share_found("They are ALPHA and 42.", ["alpha", "beta", "42", "7"]) == 0.5
    assert share_found("", ["alpha"]) == 0.0
    assert share_found("alpha", ["alpha"]) == 1.0


def test_any_found_needs_one() -> None:
    assert any_found("in france, of course", ["Normandy", "France"]) == 1.0
    assert any_found("in spain", ["Normandy", "France"]) == 0.0


def test_squad_words_drop_case_punctuation_and_articles() -> None:
    assert squad_words("The  Norse-man,\nan old 'Viking'; a THEory!") == [
        "norseman", "old", "viking", "theory",
    ]  # fmt: skip


def test_squad_f1_of_the_best_answer() -> None:
    # 2 of 4 words are the answer's 3: precision 1/2, recall 2/3, F1 = 2 * 1/3 / (7/6) = 4/7
    assert squad_f1("It was Duke Rollo.", ["duke Rollo I"]) == pytest.approx(4 / 7)
    assert squad_f1("It was Duke Rollo.", ["nobody", "Rollo", "duke Rollo I"]) == pytest.approx(
        4 / 7
    )
    # a word counts as often as both have it
    assert squad_f1("no no no", ["no no yes yes"]) == pytest.approx(4 / 7)
    assert squad_f1("Rollo", ["Richard"]) == 0.0
    assert squad_f1("the", ["Rollo"]) == 0.0
    assert squad_f1("the", ["a"]) == 1.0


def test_squad_em_needs_all_words_of_one_answer() -> None:
    assert squad_em("The 9th century.", ["900", "9th Century"]) == 1.0
    assert squad_em("in the 9th century", ["9th century"]) == 0.0


@pytest.mark.parametrize("metric", [share_found, any_found, squad_f1, squad_em])
def test_no_outputs_is_an_error(metric) -> None:
    with pytest.raises(ValueError, match="without expected outputs"):
        metric("text", [])


def test_kl_of_two_coins() -> None:
    # p = (1/2, 1/2), q = (3/4, 1/4): KL = ln(1/2) - (ln(3/4) + ln(1/4)) / 2 = ln(2 / sqrt(3))
    p, q = np.log([[0.5, 0.5]]), np.log([[0.75, 0.25]])
    np.testing.assert_allclose(kl_divergence(p, q), [math.log(2 / math.sqrt(3))], rtol=1e-12)
    # the other way round it is another number: 3/4 ln(3/2) - 1/4 ln 2
    other = 0.75 * math.log(1.5) - 0.25 * math.log(2)
    np.testing.assert_allclose(kl_divergence(q, p), [other], rtol=1e-12)


def test_kl_ignores_a_shift_of_the_logits_and_is_one_number_a_row() -> None:
    logits = np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 5.0]], dtype=np.float32)
    np.testing.assert_allclose(kl_divergence(logits, logits + 100), [0, 0], atol=1e-12)
    assert kl_divergence(logits, logits[::-1]).shape == (2,)
    assert (kl_divergence(logits, logits[::-1]) > 0).all()


def test_kl_with_masked_tokens() -> None:
    # a token that the full cache excludes adds nothing; one that only the other does is infinite
    p = np.array([[0.0, -np.inf]])
    np.testing.assert_allclose(kl_divergence(p, np.zeros((1, 2))), [math.log(2)])
    assert kl_divergence(np.zeros((1, 2)), p)[0] == np.inf


def test_top1_agreement_is_the_share_of_equal_rows() -> None:
    full = np.array([[1.0, 2.0], [5.0, 1.0], [0.0, 1.0], [3.0, 2.0]])
    other = np.array([[0.0, 9.0], [1.0, 5.0], [0.1, 0.2], [4.0, 0.0]])
    assert top1_agreement(full, other) == 0.75


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="same non-empty shape"):
        kl_divergence(np.zeros((2, 3)), np.zeros((1, 3)))
    with pytest.raises(ValueError, match="same non-empty shape"):
        top1_agreement(np.zeros((0, 3)), np.zeros((0, 3)))


def test_negative_log_likelihood_by_hand() -> None:
    logits = np.log([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    want = -(math.log(0.25) + math.log(0.8)) / 2
    assert negative_log_likelihood(logits + 3, [1, 2]) == pytest.approx(want)
    with pytest.raises(ValueError, match="a token for each row"):
        negative_log_likelihood(logits, [1])
