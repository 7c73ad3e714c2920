"""The report of runs as one HTML file: what a run folder holds, as tables, curves and pictures."""
