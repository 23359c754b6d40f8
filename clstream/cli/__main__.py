"""`python -m clstream.cli` is the command `clstream`."""

import sys

from clstream.cli.commands import main

sys.exit(main())
