"""`python -m deploy.predict` says where the command is: this room knows neither preprocessing nor NMS."""

import shlex
import sys

EXIT_ELSEWHERE = 2


def main() -> int:
    """Print the command to use; returns the exit code."""
    command = shlex.join(["python", "-m", "pipeline.predict", *sys.argv[1:]])
    print(
        f"Pictures are prepared and boxes suppressed outside the room deploy; run: {command}", file=sys.stderr
    )
    return EXIT_ELSEWHERE


if __name__ == "__main__":
    sys.exit(main())
