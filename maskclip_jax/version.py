"""The one place of the version: the package, its wheel, and files that say what made them."""

__version__ = "0.1.0"
