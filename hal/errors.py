"""The errors porthal raises on purpose. The text of each is one sentence: what was wrong, its value, what was expected."""


class PorthalError(Exception):
    """Base of every error that porthal raises on purpose."""


class UsageError(PorthalError, ValueError):
    """A wrong argument, name, shape, dtype or file content."""


class NotClaimed(PorthalError, NotImplementedError):
    """No kernel of the chosen backends claims this call, and the policy allows no fallback."""


class DataNotTaken(NotClaimed):
    """The kernel takes calls like this one, but not with these values; raised before it runs, so that another can."""


class Unavailable(PorthalError, ImportError):
    """A backend that is not here, or is here and broken."""
