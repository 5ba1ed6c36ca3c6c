"""Writes the ONNX of a run for a target, and builds the engine on request: see README.md."""

import pipeline
from configs.deploy_schema import ExportConfig
from configs.entry import hydra_entry


@hydra_entry("export")
def main(config: ExportConfig) -> None:
    """Export the run's best quantized model."""
    pipeline.run_export(config)


if __name__ == "__main__":
    main()
