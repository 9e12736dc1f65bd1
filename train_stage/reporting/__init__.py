"""What `muse-train report` reads, judges and draws."""
