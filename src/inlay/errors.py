"""InlayError and its kinds: the errors that a user can fix."""


class InlayError(ValueError):
    """A mistake in the input, the files or the settings.

    The message names the wrong value, what would be right, and the remedy. The class tells the kind of the mistake. The
    command line prints the message as one sentence, without a traceback.
    """


class BadInput(InlayError):
    """The caller gave a wrong value: an argument, an option, a name, data of another form, or a folder in use.

    Pass another value.
    """


class WrongBase(InlayError):
    """Adapter and base are both valid but do not belong together, or the adapters belong to different bases.

    Use the base that the adapter names.
    """


class DamagedFile(InlayError):
    """A file is truncated, changed or unreadable, or its parts contradict one another.

    Download it again, save it again, or repair it.
    """


class Unsupported(InlayError):
    """The request is valid, but this method, base, machine or installation cannot do it, or inlay never does it.

    Another method, base or package may make it possible. Code from strangers stays refused.
    """


class Unreachable(InlayError):
    """The Hub cannot be read or written: no network, no such repository, or no permission.

    The same request may work later, or with a token.
    """


class ComputationFailed(InlayError):
    """The input was accepted, but the computation failed: NaN or Inf, out of memory, an error over its limit.

    No wrong result was written.
    """
