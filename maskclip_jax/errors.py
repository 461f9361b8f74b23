"""The one exception a person should see as a line, not as a traceback."""


class UserError(ValueError):
    """Input the library cannot use: the message gives the rule, what came, and the remedy, on one line.

    The command line prints it and exits with code 2; library users catch it as a `ValueError`.
    """
