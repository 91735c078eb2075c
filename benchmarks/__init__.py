"""What is measured and what is put under stress by hand; nothing of the package needs it."""
