"""The laboratory: data sets x methods x sizes x students x seeds, from one plan to one report."""
