"""Launching a run, and ending it in order: signals, time limits, lost or stalled ranks, the lock of its folder."""
