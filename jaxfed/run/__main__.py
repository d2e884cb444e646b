"""``python -m jaxfed.run`` is the ``jaxfed`` command."""

import sys

from jaxfed.run.cli import main

if __name__ == "__main__":
    sys.exit(main())
