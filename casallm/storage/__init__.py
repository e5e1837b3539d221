"""Files by URL, verified end to end."""
