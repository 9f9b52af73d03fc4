"""Lines for the user, on outputs that may be closed or full."""

import contextlib
import shutil
import sys
import textwrap


def say(text: str, error: bool = False) -> None:
    """Prints a line at once. Where the output takes nothing, such as a full disk, the line is lost and nothing else.

    Args:
      error: print to standard error.
    """
    with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
        print(text, file=sys.stderr if error else sys.stdout, flush=True)


def wrapped(text: str) -> str:
    """Returns a text as lines that break between words at the width of the terminal, those after the first indented;
    unchanged where standard output is none.
    """
    with contextlib.suppress(OSError, ValueError):
        if sys.stdout is not None and sys.stdout.isatty():
            width = max(20, shutil.get_terminal_size().columns)
            return textwrap.fill(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return text


def fail(message: str, status: int = 2) -> int:
    """Prints an error and returns the status to end with."""
    say(f"error: {message}", error=True)
    return status


def first_line(error: BaseException, most: int = 300) -> str:
    """Returns the first line of what an error says, at most `most` characters; the name of its type where it
    says nothing.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]
