"""Look at data without changing it: duplicates, leaks, odd answers, languages, identifiers, lengths."""
