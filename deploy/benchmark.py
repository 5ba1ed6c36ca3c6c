"""`python -m deploy.benchmark`; the command itself is in `deploy.benchmark_command`.

A file of its own because `deploy.benchmark` is also the name of a function of this package.
"""

import sys

from deploy.benchmark_command import main

if __name__ == "__main__":
    sys.exit(main())
