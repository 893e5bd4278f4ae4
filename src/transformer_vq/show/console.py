"""The console that everything of ours prints on with rich."""

import rich.console


class Console(rich.console.Console):
    """As rich has it, but a reader that goes away is a `BrokenPipeError`, as it is for `print`.

    rich would end the process, with status 1, in the middle of whatever it is doing.
    """

    def on_broken_pipe(self) -> None:
        self.quiet = True  # so that what closes on the way out does not fail again
        raise  # the error, where rich caught it
