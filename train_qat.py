"""Quantizes a trained object detector and measures accuracy and speed at every step: see README.md."""

import pipeline
from configs.entry import hydra_entry
from configs.schema import Config


@hydra_entry(after_sweep=lambda jobs: pipeline.report_sweep(jobs))
def main(config: Config) -> float:
    """Run the configured stages and return the AP of the shipped model."""
    return pipeline.run_job(config)


if __name__ == "__main__":
    main()
