"""Masks for a whole corpus, on disk."""
