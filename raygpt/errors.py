"""The one exception that means "the user can fix this".

Everything a person can get wrong (a path, a setting, a corpus, a cluster that
is too small) raises :class:`UserError` with a message of one line: what is
wrong, where, and what to do.  ``raygpt.cli.run_job`` prints it without a
traceback and exits with :data:`EXIT_USER_ERROR`.  Any other exception is a
bug of ours and keeps its traceback.
"""

EXIT_USER_ERROR = 2


class UserError(Exception):
    """A mistake in what raygpt was given; the message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
