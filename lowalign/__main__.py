"""`python -m lowalign` is the command `lowalign`."""

import sys

from lowalign.cli import main

sys.exit(main())
