"""Outcome to DICOM object."""
