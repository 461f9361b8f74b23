"""What is kept, and what is forgotten."""

from maskclip_jax.web.cache import Memory


def test_the_longest_unused_goes_first():
    memory = Memory(10)
    for key in "abc":
        memory.put(key, key.upper(), 3)
    assert memory.get("a") == "A"
    memory.put("d", "D", 4)
    assert [memory.get(key) for key in "abcd"] == ["A", None, "C", "D"]
    assert (len(memory), memory.nbytes) == (3, 10)


def test_a_key_is_kept_once():
    memory = Memory(10)
    assert memory.put("a", 1, 8) == 1
    memory.put("a", 2, 9)
    assert (memory.get("a"), len(memory), memory.nbytes) == (2, 1, 9)


def test_the_last_one_is_kept_however_large():
    memory = Memory(10)
    memory.put("a", 1, 5)
    memory.put("b", 2, 500)
    assert (memory.get("a"), memory.get("b"), memory.nbytes) == (None, 2, 500)
    memory.put("c", 3, 1)
    assert (memory.get("b"), memory.get("c"), memory.nbytes) == (None, 3, 1)
