"""Adapters: the ports of `clarion.ports` over files, databases and brokers."""
