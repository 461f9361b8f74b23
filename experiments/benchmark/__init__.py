"""What `experiments.benchmark` is made of: counts, cases, workers (a process each), and the table."""
