"""A linear layer plus low-rank adapters, each row routed to its task's adapter."""
