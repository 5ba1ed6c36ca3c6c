"""`python -m deploy.benchmark`; see `deploy.benchmark.command`."""

from core.command import run_command
from deploy.benchmark.command import main

if __name__ == "__main__":
    run_command(main)
