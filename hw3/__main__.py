"""`python -m hw3`, for `accelerate launch`."""

import sys

from hw3.cli import main

sys.exit(main())
