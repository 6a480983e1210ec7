"""How members are evaluated."""
