"""Parts of bench.py: the paper's composition, tables and plots, the loop and the loaders."""
