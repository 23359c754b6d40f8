"""`python -m clstream.cli` is the command `clstream`."""

import sys

from clstream.cli import main

sys.exit(main())
