"""What can be wrong with data."""

from utils import UserError


class DataError(UserError):
    """A data set that is missing, incomplete or not what the config says."""


class UnreadableImage(OSError):
    """A file that cannot be read as an image."""
