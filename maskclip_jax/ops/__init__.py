"""What XLA does slowly on a CPU, done another way (products, convolutions), and what every part may use."""


def round_up(value: int, multiple: int) -> int:
    """The next multiple that is not below the value."""
    return -(-value // multiple) * multiple
