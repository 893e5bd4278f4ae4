"""The one kind of error that is the user's to mend; standard library only.

Raise `UserError`, or one of its kinds (`ConfigError`, `DataError`, `RunError`, ...), for a value, a
file or a folder that cannot be used: one sentence that names what it is, the limit, and the way
out. The command line prints that sentence. Any other exception is a fault of the program and keeps
its traceback.
"""


class UserError(ValueError):
    """Something that was given cannot be used. The message says what, why, and what to do."""


class ConfigError(UserError):
    """A field of a configuration has a value that it cannot have.

    `field`: its name, where the error is about one.
    """

    def __init__(self, message: str, field: str = ""):
        super().__init__(message)
        self.field = field
