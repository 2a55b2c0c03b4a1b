"""The gateway: DICOM in, DICOM out."""
