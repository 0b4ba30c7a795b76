"""Running a part of any decoder-only model: finding its blocks, reading only their weights, running them.

Nothing here is imported before it is used, so that ``import nbrunner`` stays free of torch.
"""
