"""What every part stands on: errors, files, ranks, signals, logs. Imports torch only where it must."""
