"""The training methods, one short file each."""
