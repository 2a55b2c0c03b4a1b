"""The web page: server-rendered, a little htmx, no build step."""
