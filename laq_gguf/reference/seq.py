"""The phase of a sequence: what it is doing, and with it how its tokens are decoded.

Calls, evictions and removals lead from one phase to the next. In native/src, laq-seq agrees.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

#: How a prompt is read: from the cells; from what probes have left in them; in view of cells and
#: archive, once something is evicted.
WHOLE, PROBED, ATTENDING = "whole", "probed", "attending"


@dataclass(frozen=True)
class Phase:
    """IDLE: tokens are decoded from the cells. READING: a prompt from position `begin` on. WAITING:
    an eviction waits for its lookahead, which begins at n_prompt. Methods give the next phase."""

    how: str = WHOLE
    begin: int | None = None
    n_prompt: int | None = None

    @property
    def is_reading(self) -> bool:
        return self.begin is not None

    @property
    def is_waiting(self) -> bool:
        return self.n_prompt is not None

    def reading(self, n_tokens: int, archived: bool) -> Phase:
        """A piece of a prompt comes after n_tokens. An eviction that waits is given up: the end of
        this prompt brings its own."""
        phase = self if self.is_reading else Phase(begin=n_tokens)
        return replace(phase, how=ATTENDING) if archived else phase

    def waiting(self, n_prompt: int) -> Phase:
        """The prompt has ended."""
        return Phase(self.how, n_prompt=n_prompt)

    def evicted(self, by_probe: bool = False) -> Phase:
        """An eviction that is not the one of the prompt's end. It ends WAITING."""
        if not self.is_reading:
            return IDLE
        return replace(self, how=PROBED) if by_probe else self.forgotten()

    def removed(self, p0: int) -> Phase:
        """Tokens from p0 on are gone: all of the prompt, or also one before it or its lookahead."""
        ends = p0 <= self.begin if self.is_reading else self.is_waiting and p0 < self.n_prompt
        return IDLE if ends else self

    def forgotten(self) -> Phase:
        """What probes have scored no longer counts."""
        return replace(self, how=WHOLE) if self.how == PROBED else self


IDLE = Phase()
