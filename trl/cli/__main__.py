"""`python -m trl.cli`."""

import sys

from trl.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
