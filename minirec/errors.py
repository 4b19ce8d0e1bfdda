"""The one exception that a person at the terminal can mend."""

import difflib


class UserError(ValueError):
    """A fault in the data, the settings or the machine, told in one line that says what to do."""


def did_you_mean(name, known):
    """Return "; did you mean 'x'?" with the nearest of the known names, or "" where none is near."""
    near = difflib.get_close_matches(str(name), known, 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
