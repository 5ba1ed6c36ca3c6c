"""The stages of the main job, one module each; `pipeline.stages.order` lists them."""
