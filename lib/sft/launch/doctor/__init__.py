"""The doctor: everything that would stop a run on a cluster, checked before a GPU is requested."""
