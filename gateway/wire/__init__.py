"""The DICOM upper layer and DIMSE on our own sockets: PS3.7 and PS3.8, no library below."""
