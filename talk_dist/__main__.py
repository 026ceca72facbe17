"""``python -m talk_dist`` is ``talk-dist``."""

import sys

from talk_dist.cli import main

sys.exit(main())
