"""The stage's tables, oldest version first."""
