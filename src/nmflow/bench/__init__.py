"""How fast it is, told honestly: against the best dense product torch has, in turns, goals and ceilings beside it."""
