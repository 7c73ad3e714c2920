"""Runs under SLURM: batch scripts filled in and submitted, and what becomes of a run."""
