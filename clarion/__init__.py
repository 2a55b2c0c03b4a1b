"""Clarion's shared package: the only one that a plug-in author imports."""
