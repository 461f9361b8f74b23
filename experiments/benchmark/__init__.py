"""What `experiments.benchmark.__main__` is made of: counts, cases, workers (a process each), and the table."""
