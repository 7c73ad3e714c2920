"""How a run goes on, survives and reports."""
