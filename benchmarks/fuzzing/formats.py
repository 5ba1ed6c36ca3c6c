"""Every format that Octet reads from files and command lines that others may have written."""

from __future__ import annotations

from benchmarks.fuzzing import datasets, models, settings
from benchmarks.fuzzing.mutations import Format

FORMATS: tuple[Format, ...] = (
    Format("data.yaml", 10, datasets.make_data_yaml),
    Format("list", 6, datasets.make_list),
    Format("labels", 12, datasets.make_labels),
    Format("COCO JSON", 12, datasets.make_coco),
    Format("image", 12, datasets.make_image),
    Format("checkpoint", 12, models.make_checkpoint),
    Format("manifest", 4, models.make_manifest),
    Format("engine sidecar", 4, models.make_sidecar),
    Format("class names", 4, models.make_names),
    Format("ONNX check", 12, models.make_graph_check),
    Format("ONNX predict", 4, models.make_graph_run),
    Format("placement", 6, settings.make_placement),
    Format("run config", 4, settings.make_run_config),
    Format("config dir", 3, settings.make_config_dir),
    Format("GPU file", 2, settings.make_gpus),
    Format("overrides", 3, settings.make_overrides),
)
