"""Where a stage runs: on this machine, or as a job on a cluster."""
