"""One module per command: `add_arguments(parser)` and `run(args)`. Heavy imports happen inside `run`."""
