"""brushstroke: low-rank adaptation of any PyTorch network."""
