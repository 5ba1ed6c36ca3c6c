"""The user's own networks, datasets and metrics, loaded by the `factory` settings."""
