"""A small world of drawn streets, to show and test adaptation with nothing to download."""
