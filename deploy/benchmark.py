"""`python -m deploy.benchmark`; the command itself is in `deploy.benchmark_command`.

A file of its own because `deploy.benchmark` is also the name of a function of this package.
"""

from deploy.benchmark_command import main
from deploy.command import run_command

if __name__ == "__main__":
    run_command(main)
