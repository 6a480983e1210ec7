"""The kinds of perturbation, and the scope in which layers ask for them."""
