"""`python -m deploy.check`; see `deploy.check.command`."""

from core.command import run_command
from core.confinement import run_confined
from deploy.check.command import main

if __name__ == "__main__":
    run_command(lambda: run_confined(main))
