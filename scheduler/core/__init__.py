"""The decisions, free of I/O: a plain object that takes events and says what to do."""
