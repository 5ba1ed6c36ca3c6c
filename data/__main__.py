"""`python -m data`; see `data.command`."""

from core.command import run_command
from data.command import main

if __name__ == "__main__":
    run_command(main)
