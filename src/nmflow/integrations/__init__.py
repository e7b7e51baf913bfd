"""Other people's trainers: at which of their moments a sparse run attaches, edits, steps, saves and finalizes.

One file a trainer; each imports its trainer when it is first used.
"""
