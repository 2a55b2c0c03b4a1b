"""Every human face: command line and web page. The only package that may import the stages."""
