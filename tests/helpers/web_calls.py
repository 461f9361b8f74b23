"""Requests as the page makes them."""

import json
import math
import urllib.error
import urllib.request
from typing import Any, NamedTuple


class Reply(NamedTuple):
    """What came back."""

    status: int
    headers: Any
    data: bytes

    @property
    def content(self) -> Any:
        """Of JSON."""
        return json.loads(self.data)


def call(url: str, data: bytes | None = None, **headers: str) -> Reply:
    """GET, or with `data` POST; a status above 399 is a reply like any other."""
    request = urllib.request.Request(url, data, {name.replace("_", "-"): value for name, value in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return Reply(reply.status, reply.headers, reply.read())
    except urllib.error.HTTPError as error:
        with error:
            return Reply(error.code, error.headers, error.read())


def ask(url: str, image: str, classes: Any, **options: Any) -> Reply:
    """POST /api/segment."""
    body = {"image": image, "classes": classes} | options
    return call(f"{url}/api/segment", json.dumps(body).encode(), Content_Type="application/json")


def same_record(ours: bytes, other: bytes) -> bool:
    """Whether two result.json say the same: sums over pixels round differently from one program to another."""
    ours, other = json.loads(ours), json.loads(other)
    for a, b in zip(ours["classes"], other["classes"], strict=True):
        for number in ("area", "confidence"):
            a_number, b_number = a.pop(number), b.pop(number)
            if a_number != b_number and not math.isclose(a_number, b_number, rel_tol=1e-6):
                return False
    return ours == other
