"""Whether a machine, or a cluster, is fit to train on: each line passes, warns or fails, and says how to mend it."""
