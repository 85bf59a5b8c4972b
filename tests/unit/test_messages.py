from __future__ import annotations

import json

import pytest

from readroom.errors import BadCall
from readroom.messages import JobMessage, pack_messages, parse_payload, queue_name, queue_names
from readroom.records import JobKind
from readroom.settings import MAX_IDS_PER_MESSAGE


def test_a_message_survives_the_way_through_json() -> None:
    message = JobMessage(JobKind.CAPTION, (3, 5, 8))

    assert parse_payload(json.loads(json.dumps(message.as_payload()))) == message


def test_a_message_describes_its_kind_and_ids_and_nothing_else() -> None:
    assert JobMessage(JobKind.ANSWER, (3, 5)).describe() == "answer jobs 3,5"


def test_ids_are_cut_into_messages_in_order() -> None:
    packed = list(pack_messages(JobKind.CAPTION, iter(range(1, 8)), 3))

    assert [message.job_ids for message in packed] == [(1, 2, 3), (4, 5, 6), (7,)]


def test_no_ids_make_no_message() -> None:
    assert list(pack_messages(JobKind.CAPTION, [], 3)) == []


@pytest.mark.parametrize(
    "payload",
    [
        None,
        "caption",
        [1],
        {},
        {"v": 2, "kind": "caption", "jobs": [1]},
        {"v": 1, "kind": "format-disk", "jobs": [1]},
        {"v": 1, "kind": ["caption"], "jobs": [1]},
        {"v": 1, "kind": "caption", "jobs": []},
        {"v": 1, "kind": "caption", "jobs": "1"},
        {"v": 1, "kind": "caption", "jobs": [0]},
        {"v": 1, "kind": "caption", "jobs": [-4]},
        {"v": 1, "kind": "caption", "jobs": [True]},
        {"v": 1, "kind": "caption", "jobs": [1.0]},
        {"v": 1, "kind": "caption", "jobs": [2**63]},
        {"v": 1, "kind": "caption", "jobs": list(range(1, MAX_IDS_PER_MESSAGE + 2))},
    ],
)
def test_a_payload_of_another_shape_is_refused_without_quoting_it(payload: object) -> None:
    with pytest.raises(BadCall) as caught:
        parse_payload(payload)

    assert "format-disk" not in str(caught.value)


def test_queues_are_named_most_urgent_first() -> None:
    assert queue_name("caption", "stat") == "caption.stat"
    assert queue_names(["caption", "answer"], ["stat", "bulk"]) == [
        "caption.stat",
        "answer.stat",
        "caption.bulk",
        "answer.bulk",
    ]
