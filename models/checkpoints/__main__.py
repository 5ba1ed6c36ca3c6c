"""`python -m models.checkpoints`; see `models.checkpoints.command`."""

from core.command import run_command
from models.checkpoints.command import main

if __name__ == "__main__":
    run_command(main)
