"""Settings of all tests."""

from hypothesis import settings

# No assertion is timed: a loaded machine is slow without being wrong.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
