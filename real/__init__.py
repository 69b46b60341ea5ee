"""Execute a plan on torch.distributed: the same stages that `sim` predicts."""
