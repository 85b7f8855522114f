"""`python -m qnext` is the `qnext` command."""

import sys

from qnext.cli.main import main

sys.exit(main())
