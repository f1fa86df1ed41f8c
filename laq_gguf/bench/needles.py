"""The needle grid: essays made here from word lists, each hiding one sentence at its own depth.

Deterministic: only `random.Random.random` is used, whose sequence Python guarantees.
"""

from __future__ import annotations

import bisect
import random
import re
from collections.abc import Callable, Sequence

SUBJECTS = (
    "A patient teacher", "The old harbour", "Every small workshop", "The village market",
    "A careful reader", "The mountain road", "Each new library", "The night train",
    "An honest friend", "The town council", "A young painter", "The river in spring",
    "The first draft of a book", "A quiet garden", "The history of bread", "Good furniture",
    "The language of sailors", "A long winter", "The study of birds", "Any great city",
    "The habit of walking", "A family recipe", "The craft of repair", "Music in the evening",
)  # fmt: skip
VERBS = (
    "teaches us more than", "is seldom praised as much as", "depends in the end on",
    "grows slowly beside", "has always competed with", "can be understood through",
    "borrows its best ideas from", "outlives", "gives meaning to", "is easily confused with",
    "begins where one would least expect it, with", "owes a great deal to",
    "asks for the same attention as", "makes a good companion for", "says little about",
    "changes once it has met",
)  # fmt: skip
OBJECTS = (
    "the weather of a whole season", "the opinion of the neighbours", "a well kept diary",
    "the tools that were used to make it", "the people who pass by each morning",
    "an argument that nobody won", "the price of salt", "a promise made in haste",
    "the work of unknown hands", "the silence after a storm", "the maps in the attic",
    "the letters of a distant cousin", "the rules of a forgotten game", "a table set for guests",
    "the colour of the hills", "what was lost on the way",
)  # fmt: skip
ENDINGS = (
    "", ", and few would deny it", ", although the reasons are debated",
    ", which explains the patience of those who know it well", ", at least in the north",
    ", or so the older books tell us", ", and that is no small comfort",
    ", even when nobody is looking", ", as anyone who has tried can confirm",
    ", and the same holds for most things worth doing",
)  # fmt: skip
COLOURS = (
    "amber", "crimson", "emerald", "golden", "indigo", "ivory", "purple", "scarlet",
    "silver", "turquoise", "violet", "yellow",
)  # fmt: skip
OBJECT_NAMES = (
    "anchor", "basket", "candle", "compass", "garden", "hammer", "lantern", "mirror",
    "piano", "rocket", "telescope", "umbrella", "violin", "wagon",
)  # fmt: skip

SENTENCES_PER_PARAGRAPH = 5


def needle_prompts(
    n: int,
    n_tokens: int,
    count_tokens: Callable[[str], int],
    seed: int = 1,
    hay: Sequence[str] | None = None,
) -> list[dict[str, object]]:
    """`n` prompts of at most `n_tokens` tokens whose needles lie at depths (i + 0.5) / n.

    Args:
        count_tokens: length of a text in the model's tokens.
        hay: sentences of a text to hide the needles in, each prompt beginning at another one;
            None: sentences made from the word lists.

    Returns:
        Records with the keys input, answer_prefix, outputs (as RULER has them) and depth.

    Raises:
        ValueError: if not even ten sentences fit, or `hay` does not fill the length.
    """
    return [_prompt(i, (i + 0.5) / n, n_tokens, count_tokens, seed, hay) for i in range(n)]


def sentences(text: str) -> list[str]:
    """The sentences of a text, blanks made single."""
    parts = (" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", text))
    return [part for part in parts if part]


def spread_order(n: int) -> list[int]:
    """0 to n - 1 in an order whose every beginning is spread over them: halves, then quarters."""

    def reversed_bits(i: int) -> float:
        value, step = 0.0, 0.5
        while i:
            value, step, i = value + step * (i & 1), step / 2, i >> 1
        return value

    # from the middle on: the first is neither end
    ranks = sorted(range(n), key=reversed_bits)
    return [(i + n // 2) % n for i in ranks]


def essay(n_sentences: int, seed: int = 1) -> str:
    """Sentences of no sense, each of eight tokens or more."""
    rng = random.Random(seed)
    return _paragraphs([_sentence(rng) for _ in range(n_sentences)])


def _prompt(
    index: int,
    depth: float,
    n_tokens: int,
    count_tokens: Callable[[str], int],
    seed: int,
    hay: Sequence[str] | None,
) -> dict[str, object]:
    rng = random.Random(seed * 1_000_003 + index)
    name = f"{_pick(rng, COLOURS)} {_pick(rng, OBJECT_NAMES)}"
    number = str(1_000_000 + int(rng.random() * 9_000_000))
    needle = f"The secret number of the {name} is {number}."
    question = (
        f"What is the secret number of the {name}? It is hidden in the essay. "
        "Answer with the number."
    )

    def message(sentences: Sequence[str]) -> str:
        at = round(depth * len(sentences))
        essay = _paragraphs([*sentences[:at], needle, *sentences[at:]])
        return f"Read this essay.\n\n{essay}\n\n{question}"

    # tokens are not additive over sentences, so the number of sentences is found by bisection
    if hay is None:
        pool = [_sentence(rng) for _ in range(max(n_tokens // 8, 10))]
    else:
        pool = _rotated(hay, index)[:n_tokens]  # none is shorter than a token
        if len(pool) < 10 or count_tokens(message(pool)) < n_tokens:
            raise ValueError(
                f"--text has no {n_tokens} tokens: give a longer one or lower --lengths"
            )
    sizes = range(10, len(pool) + 1)
    n = bisect.bisect_right(sizes, n_tokens, key=lambda size: count_tokens(message(pool[:size])))
    if n == 0:
        raise ValueError(f"a needle prompt needs more than {n_tokens} tokens: raise --lengths")
    return {
        "input": message(pool[: sizes[n - 1]]),
        "answer_prefix": f"The secret number of the {name} is",
        "outputs": [number],
        "depth": round(depth, 4),
    }


def _rotated(hay: Sequence[str], index: int) -> list[str]:
    start = int(index * 0.618034 * len(hay)) % max(len(hay), 1)
    return [*hay[start:], *hay[:start]]


def _sentence(rng: random.Random) -> str:
    words = f"{_pick(rng, SUBJECTS)} {_pick(rng, VERBS)} {_pick(rng, OBJECTS)}"
    return f"{words}{_pick(rng, ENDINGS)}."


def _paragraphs(sentences: Sequence[str]) -> str:
    step = SENTENCES_PER_PARAGRAPH
    return "\n\n".join(" ".join(sentences[i : i + step]) for i in range(0, len(sentences), step))


def _pick(rng: random.Random, words: Sequence[str]) -> str:
    return words[int(rng.random() * len(words))]
