"""One module a system; each is imported only in the process that runs it."""
