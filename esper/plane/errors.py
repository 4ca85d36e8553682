"""Errors of finding and starting planes."""


class PlaneError(RuntimeError):
    """A plane cannot be reached, started or understood; the message says why in one sentence."""
