"""Needle prompts in essays, made from word lists: the same on every machine.

An essay of about `n_words` words holds one sentence with a number; the prompt ends with the
beginning of the answer, so that the number is the next thing a model should write.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

SUBJECTS = (
    "a good craftsman", "the young founder", "an honest teacher", "the village council",
    "a patient reader", "the old printer", "every careful engineer", "the traveling merchant",
    "a curious child", "the harbor master", "an experienced gardener", "the night watchman",
    "a small company", "the retired captain", "a modest painter", "the local historian",
)  # fmt: skip
VERBS = (
    "learns to trust", "rarely forgets", "often returns to", "begins with", "quietly improves",
    "depends upon", "writes about", "argues against", "remembers", "pays attention to",
    "takes pleasure in", "spends years on", "knows the value of", "is shaped by",
)  # fmt: skip
OBJECTS = (
    "the work of earlier generations", "simple tools that last", "a long walk before breakfast",
    "ideas that seem foolish at first", "the habits of the people nearby", "a well kept notebook",
    "problems nobody else wants", "the smell of fresh bread", "the slow change of the seasons",
    "letters from distant friends", "the quiet hours of the morning", "an unfinished house",
    "questions without an answer", "the price of timber", "a map drawn from memory",
    "stories told beside the fire", "mistakes made in a hurry", "the kindness of strangers",
)  # fmt: skip
REASONS = (
    "because there is no shortcut worth taking", "even when the weather turns against the plan",
    "and this is how most lasting things are built", "although few people would admit it",
    "since patience is cheaper than regret", "while the rest of the town is still asleep",
    "which is why the result surprises everyone", "as long as there is light to see by",
    "and the reward comes later than expected", "before the first customer arrives",
    "though it costs more than it seems to", "until the habit becomes a second nature",
)  # fmt: skip
OPENINGS = (
    "In those days", "For the most part", "On the other hand", "After many years",
    "To be fair", "In a quiet way", "More than once", "At the end of the day",
    "By all accounts", "In the long run", "As a rule", "Now and then",
)  # fmt: skip
ADJECTIVES = (
    "gentle", "curious", "ancient", "brave", "silent", "golden", "distant", "clever", "humble",
    "restless", "hollow", "bright", "crooked", "frozen", "patient", "wandering", "velvet", "amber",
    "proud", "scarlet",
)  # fmt: skip
NOUNS = (
    "lantern", "orchard", "compass", "violin", "harvest", "bridge", "falcon", "garden", "anchor",
    "mirror", "teapot", "glacier", "meadow", "ladder", "candle", "island", "kettle", "feather",
    "wagon", "chimney",
)  # fmt: skip


@dataclass(frozen=True)
class Needle:
    """One prompt: `document`, then `question`; a model has found it if it writes `answer`."""

    document: str
    question: str
    answer: str


def _sentence(rng: random.Random) -> str:
    words = f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(OBJECTS)}"
    if rng.random() < 0.4:
        words = f"{rng.choice(OPENINGS)}, {words}"
    if rng.random() < 0.7:
        words = f"{words}, {rng.choice(REASONS)}"
    return words[0].upper() + words[1:] + "."


def _essay(rng: random.Random, n_words: int) -> list[str]:
    sentences: list[str] = []
    count = 0
    while count < n_words:
        sentences.append(_sentence(rng))
        count += len(sentences[-1].split())
    return sentences


def make_needle(index: int, n_words: int) -> Needle:
    """Prompt number `index`; its needle lies at a depth that moves through the essay."""
    rng = random.Random(f"needle {index}")
    key = f"{ADJECTIVES[index % len(ADJECTIVES)]} {rng.choice(NOUNS)}"
    value = str(rng.randrange(1_000_000, 10_000_000))
    sentences = _essay(rng, n_words)
    depth = 0.05 + 0.85 * ((index * 7) % 20) / 20
    place = int(depth * len(sentences))
    sentences.insert(place, f"One of the special magic numbers for {key} is: {value}.")
    paragraphs = [" ".join(sentences[i : i + 6]) for i in range(0, len(sentences), 6)]
    head = (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n"
    )
    question = (
        f"\nWhat is the special magic number for {key} mentioned in the provided text? "
        f"The special magic number for {key} mentioned in the provided text is"
    )
    return Needle(document=head + "\n".join(paragraphs), question=question, answer=value)
