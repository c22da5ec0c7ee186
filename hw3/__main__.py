"""`python -m hw3`, for launchers."""

import os
import sys

from hw3.cli import main

status = main()
if status and os.environ.get("WORLD_SIZE", "1") != "1":
    # On the usual way out, connections to processes that are gone are waited for.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
sys.exit(status)
