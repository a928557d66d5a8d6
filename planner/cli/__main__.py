"""`python -m planner.cli`: the command line without the installed script."""

import sys

from planner.cli import main

sys.exit(main())
