"""The base of every error whose message tells a user all there is to know; commands print it without a traceback."""


class UserError(Exception):
    """Something the user can mend: a setting, a file, a server. The message names it and says what to do."""


class ConfigError(UserError, ValueError):
    """A setting is unknown, of the wrong type, or contradicts another; the message says what to change."""
