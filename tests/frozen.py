"""Preloaded last by a server of processes: its forks then collect no garbage of what it has imported, which would copy half of its pages."""

import gc

gc.collect()
gc.freeze()
