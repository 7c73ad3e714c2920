"""Matches of a trained run, judged by the target's true labels: which are wrong, and what they pull where."""
