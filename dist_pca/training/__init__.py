"""The trainer: engine, checkpoints and logs of a run, and what keeps it running on many machines."""
