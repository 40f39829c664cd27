"""The one error that inlay raises for what a user can mend."""


class InlayError(ValueError):
    """A mistake in input, files or settings: the message gives what was expected, what came, and the remedy.

    The command line prints it as one sentence, without a traceback.
    """
