"""Starting and supervising inference servers; the embedded engine server."""
