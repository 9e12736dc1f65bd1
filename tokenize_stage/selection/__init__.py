"""Which samples become rows: metadata filters, deny-lists, duplicates."""
