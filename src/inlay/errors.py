"""The error that inlay raises for what a user can mend, and its kinds."""


class InlayError(ValueError):
    """A mistake in input, files or settings: the message gives what was expected, what came, and the remedy.

    The command line prints it as one sentence, without a traceback. Its class says which kind it is.
    """


class BadInput(InlayError):
    """A value that the caller gave is wrong: an argument, an option, a name, data of another form, a folder in use.

    Another value is right.
    """


class WrongBase(InlayError):
    """The adapter is right and so is the base, but they do not belong together; or adapters of several bases do not.

    The base that the adapter names is right.
    """


class DamagedFile(InlayError):
    """A file does not hold what it must: truncated, changed, not readable, or its parts contradict one another.

    Download it again, save it anew or repair it.
    """


class Unsupported(InlayError):
    """The request is valid, but not possible with this method, base, machine or installation, or never done by inlay.

    Another method, base or package may make it possible; code from strangers stays refused.
    """


class Unreachable(InlayError):
    """The Hub does not give or take it: no network, no such repository, or no right to it.

    The same can work later, or with a token.
    """


class ComputationFailed(InlayError):
    """The input was accepted, but no usable result came of it: NaN or Inf, out of memory, an error above its limit.

    Nothing wrong was written.
    """
