"""The backend of qpth, the batched interior point for GPUs."""
