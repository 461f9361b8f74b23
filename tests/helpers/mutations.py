"""Damage to files, seeded: values of JSON replaced by odd ones, bytes flipped, cut and put in."""

import json
import random
import resource
import sys

ODD = (
    *(None, True, False, -1, 0, 1, 2, 3, 1.5, -0.0, 1e-30, 1e308, 64, 4096, 2**16, 10**9, 10**30, 2**31, 2**63),
    *("", "x", "\ud800", "x" * 5000, [], {}, [[]], [0], [1, 2], [1e9, 1e9], [None] * 3, {"a": {"b": []}}, [10**12] * 4),
)


def mutated_json(text: str, rng: random.Random) -> bytes:
    """One value replaced or removed, or the bytes damaged."""
    if rng.random() < 0.15:
        return mutated_bytes(text.encode(), rng)
    content = json.loads(text)
    place, key = content, None
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        parent, key = place, rng.choice(keys)
        place = place[key]
        if not isinstance(place, dict | list) or rng.random() < 0.25:
            break
    if key is None:
        return json.dumps(rng.choice(ODD)).encode()
    if rng.random() < 0.15:
        del parent[key]
    else:
        parent[key] = rng.choice(ODD)
    return json.dumps(content).encode()


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """Bytes flipped near the start, anywhere or near the end; cut; something put in."""
    out, kind = bytearray(content), rng.randrange(4)
    if kind == 0:
        return bytes(out[: rng.randrange(len(out))])
    if kind == 1:
        at = rng.randrange(len(out))
        out[at:at] = rng.randbytes(rng.randint(1, 8))
        return bytes(out)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        region = rng.choice(((0, 64), (0, 2000), (0, len(out)), (len(out) - 2000, len(out))))
        out[rng.randrange(max(0, region[0]), max(1, min(region[1], len(out))))] = rng.randrange(256)
    return bytes(out)


def most_memory() -> int:
    """The most memory in bytes that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
