"""`python -m pipeline.commands` is `octet`, where the package is not installed."""

from pipeline.commands.octet import console

if __name__ == "__main__":
    console()
