"""`python -m clp_engine.cli` is `clp`."""

import sys

from clp_engine.cli import main

sys.exit(main())
