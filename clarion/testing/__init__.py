"""For authors of plug-ins and for our own tests: generated data, a PACS, contract suites over every port."""
