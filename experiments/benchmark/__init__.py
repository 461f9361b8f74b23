"""What `experiments.benchmarks` is made of: counts, cases, workers (a process each), and the table."""
