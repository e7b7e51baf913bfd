"""What run folders say: tables, plots and pages made from their JSON.

What is said of a network (`coverage`, `flops`, `memory`) needs torch, the rest does not.
"""
