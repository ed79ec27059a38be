"""Making the miniature: the world of scenes and captions, one file per training stage, and the evaluation.

Each stage is one command, `python -m flux_lab.training.<stage>`, that can be killed at any moment and run again.
"""
