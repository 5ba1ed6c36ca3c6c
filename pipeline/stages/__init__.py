"""The stages of the main job, one module each."""
