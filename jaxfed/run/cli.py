"""The ``jaxfed`` command: parses arguments, and says a sentence instead of a traceback where something is wrong.

Exit status: 0 done, 2 wrong input, 3 another process of the run has ended, 130 stopped by Ctrl-C.
``JAXFED_DEBUG=1`` shows the traceback too.
"""

import os
import sys
import traceback
import warnings
from typing import Any

import jax

from jaxfed.run import machines
from jaxfed.run.environment import extra

_WRONG_INPUT, _INTERRUPTED = 2, 130
_LONGEST = 600


def main(arguments: list[str] | None = None) -> int:
    """Runs the command. Of several processes, one that fails ends here.

    Args:
        arguments: Without the program's name; those of the command line by default.

    Returns:
        The exit status.
    """
    return machines.leave(_status(arguments))


def _status(arguments: list[str] | None) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = _show_warning
        try:
            with extra("The command"):
                from jaxfed.run import commands
            return commands.parse(sys.argv[1:] if arguments is None else arguments)()
        except KeyboardInterrupt:
            print("Stopped.", file=sys.stderr)
            return _INTERRUPTED
        except SystemExit as end:  # from the parser, which has said why
            return end.code if isinstance(end.code, int) else _WRONG_INPUT
        except (ValueError, TypeError, OSError, ImportError, jax.errors.JaxRuntimeError) as error:
            if os.environ.get("JAXFED_DEBUG"):
                traceback.print_exc()
            print(f"jaxfed: {sentence(error)}", file=sys.stderr)
            return _WRONG_INPUT


def sentence(error: Exception) -> str:
    """What an error says, in one line.

    >>> sentence(OSError(28, "No space left on device", "runs/digits/history.jsonl"))
    'runs/digits/history.jsonl: No space left on device.'
    """
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    text = " ".join(line.strip() for line in str(error).splitlines()) or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ... (JAXFED_DEBUG=1 shows all)"


def _show_warning(message: Any, category: Any, *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        print(f"jaxfed: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
