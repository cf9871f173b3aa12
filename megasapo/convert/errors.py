"""What goes wrong with a conversion and a user can mend."""

from megasapo.errors import UserError


class ConvertError(UserError, RuntimeError):
    """A checkpoint cannot be converted or compared; the message names file and tensor and says what to do."""


class WriteError(ConvertError):
    """The disk is full, or a file cannot be written; what has been finished is kept."""
