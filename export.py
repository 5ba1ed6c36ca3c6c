"""Writes the ONNX of a run for a target, and builds the engine on request: see README.md."""

from configs.entry import hydra_entry
from configs.schema import ExportConfig
from pipeline import run_export


@hydra_entry("export")
def main(config: ExportConfig) -> None:
    """Export the run's best quantized model."""
    run_export(config)


if __name__ == "__main__":
    main()
