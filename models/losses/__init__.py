"""Training losses and the assigner of targets."""
