"""Matrix products, convolutions and other array routines that need nothing else of the library."""


def round_up(value: int, multiple: int) -> int:
    """The next multiple that is not below the value."""
    return -(-value // multiple) * multiple
