"""The readers of input files: each cuts one container (lines, whole files, tars, parquet) into records."""
