"""Who does what, and what became of it: tasks, plans, ledgers."""
