"""One module per peer, imported only when asked for."""
