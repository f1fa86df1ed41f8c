"""Random sequences of calls: a Llama does what its numpy model does, or both refuse.

A crash shows no sequence: add -s --hypothesis-verbosity=debug, which prints each call before it is
made. Sequences are the same each time, unless there is

env: LAQ_PROPERTY_EXAMPLES  sequences for each setup, random ones; default: a few, always the same
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from property.machine import CacheMachine
from property.setups import SETUPS, SHAPE, Setup

N_EXAMPLES = int(os.environ.get("LAQ_PROPERTY_EXAMPLES", "0"))
SEQUENCES = settings(
    max_examples=N_EXAMPLES or 20,
    stateful_step_count=20,
    derandomize=N_EXAMPLES == 0,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def load_nothing(machine: CacheMachine) -> None:
    session, state = machine.save_session(), machine.save()
    machine.read(n=300)
    machine.load_session(session=session)
    machine.read(n=300)
    machine.load_a_truncated_state(state=state, share=0.0)
    machine.load(state=state)


def remove_all_that_is_left(machine: CacheMachine) -> None:
    machine.read(n=40)
    machine.decode(n=12)
    machine.remove(begin="intact", offset=0, n=None)
    session = machine.save_session()
    machine.go_back(n=120, n_new=30)
    machine.load_session(session=session)
    machine.read(n=30)


def go_back_beyond_all_queries(machine: CacheMachine) -> None:
    machine.read(n=200)
    machine.decode_in_batches(n=100)
    machine.remove(begin="end", offset=-60, n=None)
    machine.evict(n_keep=100)
    machine.read(n=300)


def read_on_without_queries(machine: CacheMachine) -> None:
    machine.read(n=200)
    machine.decode(n=160)
    machine.go_back(n=45, n_new=200)
    machine.read(n=300)


def park_while_an_eviction_waits(machine: CacheMachine) -> None:
    machine.read(n=400)
    machine.decode(n=3)
    machine.park(name="a")
    machine.read(n=200)
    machine.decode(n=12)
    state = machine.save()
    machine.park(name="b")
    machine.resume(name="a")
    machine.prompt_end()
    machine.decode(n=12)
    machine.remove(begin="end", offset=-5, n=None)
    machine.park(name="a")
    machine.load(state=state)
    machine.resume(name="a")
    machine.recall()
    machine.read(n=100)
    machine.resume(name="b")
    machine.read(n=100)


@dataclass
class Machines:
    """Makes classes of machines."""

    native: Any
    path: Path
    folder: Path

    def of(self, setup: Setup) -> type[CacheMachine]:
        members = {**vars(self), "setup": setup}
        # the sequences are derived from the name
        return type(f"CacheMachine({setup})", (CacheMachine,), members)


@pytest.fixture
def machines(
    native: Any,
    tiny_gguf: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Machines:
    monkeypatch.setenv("LAQ_DEBUG", "1")  # the scores of the last eviction are kept
    monkeypatch.setenv("LAQ_COMPACT", "host")
    monkeypatch.setenv("LAQ_CELLS", "host")
    return Machines(native, tiny_gguf("llama", **SHAPE), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_calls_in_any_order(machines: Machines, setup: Setup) -> None:
    run_state_machine_as_test(machines.of(setup), settings=SEQUENCES)


@pytest.mark.parametrize(
    "calls",
    [
        load_nothing,
        remove_all_that_is_left,
        go_back_beyond_all_queries,
        read_on_without_queries,
        park_while_an_eviction_waits,
    ],
    ids=lambda calls: calls.__name__,
)
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_calls_that_went_wrong(
    machines: Machines, setup: Setup, calls: Callable[[CacheMachine], None]
) -> None:
    machine = machines.of(setup)()
    try:
        calls(machine)
        machine.both_count_alike()
    finally:
        machine.teardown()
