"""``python -m omnimamba_model`` is the ``omnimamba`` command."""

import sys

from .cli import main

sys.exit(main())
