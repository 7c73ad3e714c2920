"""Check whether a machine or a cluster is ready for training; each check passes, warns or fails, with a fix."""
