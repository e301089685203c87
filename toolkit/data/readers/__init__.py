"""One module a form of data: from the bytes of a file to rows, one after the other, whatever columns they have."""
