"""Speed beside the strongest plain alternatives: entries as data, one runner, one report."""
