"""From files and Hub data sets to batches: sources → tasks → examples → batches."""
