"""The train stage: first weights, optimizer, loop, checkpoints, metrics and uploads."""
