"""Takes a trained float detector to an INT8 engine, and shows the proof: see README.md."""

from configs.entry import hydra_entry
from configs.schema import Config
from pipeline import report_sweep, run_job


@hydra_entry(after_sweep=report_sweep)
def main(config: Config) -> float:
    """Run the configured stages and return the AP of the shipped model."""
    return run_job(config)


if __name__ == "__main__":
    main()
