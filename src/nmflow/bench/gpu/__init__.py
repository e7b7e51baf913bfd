"""`nmflow bench gpu`: what is measured on a GPU, what it is to reach, and by whom it is measured."""
