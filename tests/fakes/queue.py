"""Looking into the queues without taking anything from them."""

from __future__ import annotations

import base64
import json
from typing import Any

from celery import Celery

from readroom.transport import redis_client


def read_payloads(app: Celery, queue: str) -> list[Any]:
    """The arguments of all messages on a queue, the next to be taken first."""
    raw = redis_client(app).lrange(queue, 0, -1)
    return [json.loads(base64.b64decode(json.loads(text)["body"]))[0][0] for text in reversed(raw)]
