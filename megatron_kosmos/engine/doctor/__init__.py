"""Whether a machine, or every node of a job, is fit to train: looked at from each node, judged on the first.

Nothing here loads more than torch, so that a node's processes, one a GPU, start in a moment and fit anywhere.
"""
