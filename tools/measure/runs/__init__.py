"""Commands under time limits whose documents become one report."""
