"""The contract suite: what stays true whichever model is made sparse. Behaviours (test_*.py) x hosts (hosts.py)."""
