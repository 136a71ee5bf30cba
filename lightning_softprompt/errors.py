"""The one error class of the library."""


class SoftPromptError(ValueError):
    """Something a user can mend: the message says what was expected, what was found and what to do."""
