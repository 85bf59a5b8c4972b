"""The state machine, enumerated: each pair of states is either a listed step or refused."""

from __future__ import annotations

from itertools import product

import pytest

from db.jobs import check_transition
from readroom.errors import BadCall
from readroom.records import FINAL_STATES, TRANSITIONS, JobState

PAIRS = list(product(JobState, JobState))


def test_the_machine_has_six_states_and_twelve_steps() -> None:
    assert len(PAIRS) == 36
    assert set(TRANSITIONS) == set(JobState)
    assert sum(len(targets) for targets in TRANSITIONS.values()) == 12


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_step_passes_exactly_when_it_is_listed(source: JobState, target: JobState) -> None:
    if target in TRANSITIONS[source]:
        check_transition(source, target)
    else:
        with pytest.raises(BadCall, match=f"a {source} job cannot become {target}"):
            check_transition(source, target)


def test_no_state_leads_to_itself() -> None:
    assert all(state not in targets for state, targets in TRANSITIONS.items())


def test_only_failed_and_cancelled_jobs_leave_a_final_state_and_only_by_a_persons_hand() -> None:
    left = {state: TRANSITIONS[state] for state in FINAL_STATES if TRANSITIONS[state]}
    assert left == {
        JobState.FAILED: {JobState.QUEUED, JobState.CANCELLED},
        JobState.CANCELLED: {JobState.QUEUED},
    }


def test_every_state_is_reached_from_waiting() -> None:
    reached: set[JobState] = set()
    grown = {JobState.WAITING}
    while grown != reached:
        reached = set(grown)
        grown = reached.union(*(TRANSITIONS[state] for state in reached))
    assert reached == set(JobState)
