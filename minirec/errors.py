"""The one exception that a person at the terminal can mend."""


class UserError(ValueError):
    """A fault in the data, the settings or the machine, told in one line that says what to do."""
