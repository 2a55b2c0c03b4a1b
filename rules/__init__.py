"""Built-in grouping rules: pure, and loaded by the same entry points as a stranger's."""
