"""Masks as other people's tools read them: `run.py export`. What is written where: `formats.FORMATS`."""
