"""What quantization-aware fine-tuning adds to training: distillation, oscillation, scales."""
